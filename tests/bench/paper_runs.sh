#!/usr/bin/env bash
# Every training of the paper's model that the tables show, side by side on one GPU: `paper_runs.sh all`.
# A call ends after SECONDS_LEFT; call it again to go on (finished runs are skipped, others resume).
#
#   DATA     folder with train.safetensors and the sets to measure on (*.safetensors), made by `mbc train paper-data`
#   ENCODER  folder of the sentence encoder        LM  folder of the language model (GGUF=file inside it, if it is one)
#   OUT      folder for the models, one below it for each run
#   SETS     names of the sets to measure on       PY  python to run
set -u
: "${DATA:?}" "${ENCODER:?}" "${LM:?}" "${OUT:?}"
GGUF=${GGUF:-} PY=${PY:-python3} SETS=${SETS:-"squad news archivalqa"} SECONDS_LEFT=${SECONDS_LEFT:-540}
STEPS=${STEPS:-4000} SWEEP=${SWEEP:-300} EXTRA=${EXTRA:-} QUESTIONS=${QUESTIONS:-500}
WEIGHTS=${WEIGHTS:-mbc_core/weights}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} TOKENIZERS_PARALLELISM=false TORCHINDUCTOR_COMPILE_THREADS=${THREADS:-4}
ends=$(($(date +%s) + SECONDS_LEFT))
mkdir -p "$OUT"

# run NAME options…: until it is finished, or the call's time is over less what measuring takes.
run() {
  local name=$1 left sets=() set
  shift
  if grep -qs '"finished": true' "$OUT/$name/card.json"; then return; fi
  left=$(awk "BEGIN {print ($ends - $(date +%s) - ${MEASURE:-45}) / 60}")
  if awk "BEGIN {exit !($left < 0.2)}"; then return; fi
  for set in $SETS; do
    if [ -f "$DATA/$set.safetensors" ]; then sets+=(--evaluate "$set=$DATA/$set.safetensors"); fi
  done
  "$PY" -m mbc_core.cli.train paper "$DATA/train.safetensors" --encoder "$ENCODER" --lm "$LM" \
    ${GGUF:+--gguf "$GGUF"} --out "$OUT/$name" --call-minutes "$left" --documents 64 --questions 2 \
    "${sets[@]}" --evaluate-questions "$QUESTIONS" "$@" $EXTRA >"$OUT/$name.out" 2>>"$OUT/$name.log"
  echo "$(date +%T) $name $(tail -c 200 "$OUT/$name.out")"
}

address12="--codes address --tokens 12 --codebook $WEIGHTS/codebook_t12.safetensors --rank 12 --prefix-hidden 512"
address24="--codes address --tokens 24 --codebook $WEIGHTS/codebook_t24.safetensors --rank 12 --prefix-hidden 512"
learned="--codes learned --codebook-by ${BY:-ema} --freeze-encoder"
# Small banks first, and words asked for before answers: without them no code was read after 200 steps.
course="--steps $STEPS --banks 1,4,16,64 --grow-every ${GROW:-300} --cue-steps ${CUES:-1000} --look-every 200"
fixed="--steps $SWEEP --flat 0 --minutes 0 --look-every 200 --banks 1,4,16,64 --grow-every 60 --cue-steps 200"

# The main configuration gets a lane of its own; sweeps are at one small budget and are not converged.
lane1() { run learned $learned $course --minutes "${MAIN_MINUTES:-7}"; }
lane2() {
  run address_t24 $address24 $course --minutes "${MINUTES:-3.3}"
  run address_t12 $address12 $course --minutes "${MINUTES:-3.3}"
}
lane3() {
  run learned_closed $learned $course --closed --minutes "${MINUTES:-3.3}"
  run address_closed $address12 $course --closed --minutes "${MINUTES:-3.3}"
}
lane4() {
  run mac_kv_lora $learned $course --no-quantize --minutes "${MAC_MINUTES:-2}"
  run mac $learned $course --no-quantize --no-kv-lora --minutes "${MAC_MINUTES:-2}"
  run sweep_base $learned $fixed
  run sweep_k128 $learned $fixed --codewords 128
  run sweep_k2048 $learned $fixed --codewords 2048
  run sweep_t24 $learned $fixed --tokens 24
  run sweep_no_reset $learned $fixed --no-reset
  run sweep_gradient $learned $fixed --codebook-by gradient
  run sweep_no_kv_lora $learned $fixed --no-kv-lora
  run sweep_no_vq $learned $fixed --no-quantize
  run sweep_no_standardize $learned $fixed --no-standardize
}

case "${1:-all}" in
  all) for lane in 1 2 3 4; do "lane$lane" & done ;;
  main) lane1 ;;
  lane[1-4]) "$1" ;;
  try) # a minute each of three kinds, to see how fast they are and whether they read
    for one in "try_learned $learned" "try_address $address24" "try_closed $learned --closed"; do
      SETS= run $one $course --minutes "${TRY_MINUTES:-1}" --look-every 50 --flat 0 &
    done ;;
  *) echo "usage: paper_runs.sh all|main|lane1|…|lane4|try" >&2; exit 2 ;;
esac
wait
