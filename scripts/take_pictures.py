"""Pictures of the documentation: figures of the report of a demo run, as small PNGs in docs/pictures.

    crosslens demo --out runs/demo && python scripts/take_pictures.py runs/demo

Every picture is a figure of the report, found by its anchor, or the top of a feature's or a task's page, but for one,
which draws the table of docs/architectures.md. Needs Chromium in PATH; playwright and matplotlib come with `make test`.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image
from playwright.sync_api import Page, sync_playwright

OUT = Path(__file__).parents[1] / "docs" / "pictures"
MAX_BYTES = 150_000
FIGURES = {  # picture: page and anchor
    "accuracy": "index.html#figure-accuracy",
    "explained-variance": "index.html#figure-explained-variance",
    "cross-entropy": "index.html#figure-cross-entropy",
    "dynamics": "index.html#figure-dynamics",
    "presence": "evolution.html#figure-evolution-map",
    "births": "evolution.html#figure-birth-counts",
    "rotation": "evolution.html#figure-rotation-rate",
    "probes": "evolution.html#figure-probe-presence",
    "relie": "task-pp.html#figure-share-relie-pp",
    "words": "task-pp.html#figure-words-pp",
    "validation": "task-pp.html#figure-validation-pp",
    "timeline": "task-pp.html#figure-timeline-pp",
    "dates": "task-simple.html#figure-dates-simple",
    "read-out": "task-simple.html#figure-read-out-simple",
    "ablation": "task-pp.html#figure-ablate-size-pp",
    "keeping": "task-pp.html#figure-keep-size-pp",
    "transfer": "task-pp.html#figure-transfer-pp",
}


def save(name: str, png: bytes) -> None:
    """A picture in 64 colours, which for charts and text look like all of them."""
    picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    path = OUT / f"{name}.png"
    picture.save(path, optimize=True)
    if path.stat().st_size > MAX_BYTES:
        raise SystemExit(f"{path} has {path.stat().st_size:,} bytes, more than {MAX_BYTES:,}")


def take(page: Page, report: Path, feature: int) -> None:
    for name, where in FIGURES.items():
        file, anchor = where.split("#")
        page.goto((report / file).resolve().as_uri())
        page.add_style_tag(content=".actions { display: none !important }")  # links to numbers
        figure = page.locator(f"#{anchor}")
        figure.scroll_into_view_if_needed()
        page.wait_for_timeout(2_000)  # figures are drawn when they come into view
        save(name, figure.screenshot())
    page.set_viewport_size({"width": 1180, "height": 950})
    for name, where in (("feature", f"feature.html#{feature}"), ("task", "task-pp.html")):
        page.goto(f"{report.resolve().as_uri()}/{where}")
        page.add_style_tag(content=".actions { display: none !important }")
        page.wait_for_timeout(3_000)
        save(name, page.screenshot())


def draw_architectures() -> bytes:
    """Planted features that are recovered against births that are false, by architecture and regime."""
    lines = (OUT.parent / "architectures.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = [row for row in cells if row[0] in ("easy", "crowded", "entangled")]
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), sharex=True, sharey=True, layout="constrained")
    for axis, regime in zip(axes, ("easy", "crowded", "entangled"), strict=True):
        for marker, (_, name, recovered, _, false, *_) in zip(
            "osD^x", (row for row in rows if row[0] == regime), strict=True
        ):
            axis.plot(float(false.split()[0]), float(recovered.split()[0]), marker, label=name, ms=8)
        axis.set_title(regime)
        axis.set_xlabel("false births, %")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("features recovered, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    png = io.BytesIO()
    figure.savefig(png, dpi=130)
    return png.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory of `crosslens demo`, with its report")
    parser.add_argument("--feature", type=int, default=217, help="feature whose page is shown")
    args = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SystemExit("needs chromium, chromium-browser or google-chrome in PATH")
    save("architectures", draw_architectures())
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 960, "height": 1000}, device_scale_factor=1.5)
        take(page, args.run / "report", args.feature)
        browser.close()


if __name__ == "__main__":
    main()
