#!/usr/bin/env bash
# All that needs a CUDA machine, offline, in under ten minutes: tests, figures, a profile, and one dated report.
#
#     bash benchmarks/gpu.sh                        # README.md says what to carry to a machine without network
#     bash benchmarks/gpu.sh --device cpu --tiny    # the same programs at small shapes, as a test runs them
#
# A part that fails or exceeds its seconds is named at the end, and in the exit status; the others run all the same.
# Environment: PYTHON (python3), REPORTS (benchmarks/reports).
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} device=cuda tiny=
while (($#)); do
    case $1 in
        --device) device=${2:?}; shift 2 ;;
        --tiny) tiny=1; shift ;;
        *) echo "unknown option $1; see the head of $0" >&2; exit 2 ;;
    esac
done
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 WANDB_MODE=disabled
if [[ $device == cuda* ]] && ! "$python" -c 'import torch; assert torch.cuda.is_available()'; then
    echo "torch of $python sees no CUDA device; use --device cpu --tiny to try the parts" >&2
    exit 2
fi
parts=$(mktemp -d)
trap 'rm -rf "$parts"' EXIT
failed=() number=10

part() { # title, seconds, command: its output becomes a section of the report
    local title=$1 seconds=$2 file=$parts/$((number++)) began=$SECONDS
    shift 2
    timeout --kill-after=10 "$seconds" "$@" >"$file.md" 2> >(tee "$file.log" >&2)
    local status=$?
    echo "$title: $((SECONDS - began)) s$( ((status)) && echo ", FAILED with status $status")" | tee "$file.title"
    if ((status)); then
        failed+=("$title ($status)")
        { echo; echo '```'; tail -n 30 "$file.log"; echo '```'; } >>"$file.md"
    fi
}

selected=(-m gpu -n 6) steps=(--rounds 3) paper=(--rounds 3 --precision "tf32, bfloat16 moments") density=(--precision float32 --precision tf32 --precision bfloat16) size=()
if [[ $tiny ]]; then
    selected=(-k "pretended and selection")
    steps=(--shape 2,8,128,32 --k 4 --l1-l0 20 --rounds 1)
    paper=(--shape 2,8,128,32 --k 4 --rounds 1)
    density=(--shape 2,8,128,32 --densities .05,.2 --rounds 1)
    size=(--tiny)
fi
step=("$python" benchmarks/training_step.py --device "$device" --precision bfloat16)
[[ $device == cuda* ]] && step+=(--precision tf32)
part "Tests" 180 "$python" -m pytest --disable-warnings -p no:cacheprovider tests/crosscoders/test_gpu.py tests/crosscoders/test_exactness.py tests/activations/test_feed.py tests/pipeline/test_gpu.py "${selected[@]}"
part "Large products" 70 "$python" benchmarks/gpu.py products --device "$device" "${size[@]}"
part "Training step" 150 "${step[@]}" --kinds batchtopk,batchtopk-aux,topk,jumprelu "${steps[@]}"
part "Training step, paper's shape" 90 "${step[@]}" --paper --kinds batchtopk "${paper[@]}"
part "Profile of training steps" 60 "$python" benchmarks/gpu.py profile --device "$device" "${size[@]}"
part "From the cache to the device, and whole runs" 90 "$python" benchmarks/gpu.py runs --device "$device" "${size[@]}"
part "Density from which dense products are faster" 90 "$python" benchmarks/density.py --device "$device" --rounds 3 "${density[@]}"
"$python" benchmarks/gpu.py report --device "$device" --parts "$parts" --folder "${REPORTS:-benchmarks/reports}" \
    --command "bash benchmarks/gpu.sh --device $device${tiny:+ --tiny}" || failed+=(Report)
if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
