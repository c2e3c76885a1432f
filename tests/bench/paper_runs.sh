#!/usr/bin/env bash
# Every training of the paper's model that the tables show, side by side on one GPU: `paper_runs.sh main` is the one
# that a report needs, `sweeps` the small ones (each SWEEP steps, whatever the others do), `clips` four that tell what
# the gradients' limits and Adam's beta2 do, `all` everything in turn. Closed books and MAC are trained as long as the
# model they stand beside (`--like`), so their lanes wait for it.
# A call ends after SECONDS_LEFT; call it again to go on (finished runs are skipped, others resume).
#
#   DATA     folder with train.safetensors and the sets to measure on (*.safetensors), made by `mbc train paper-data`
#   ENCODER  folder of the sentence encoder        LM  folder of the language model (GGUF=file inside it, if it is one)
#   OUT      folder for the models, one below it for each run
#   SETS     names of the sets to measure on       PY  python to run
set -u
: "${DATA:?}" "${ENCODER:?}" "${LM:?}" "${OUT:?}"
GGUF=${GGUF:-} PY=${PY:-python3} SETS=${SETS:-"squad news archivalqa"} SECONDS_LEFT=${SECONDS_LEFT:-520}
STEPS=${STEPS:-2500} SWEEP=${SWEEP:-300} EXTRA=${EXTRA:-} QUESTIONS=${QUESTIONS:-500}
WEIGHTS=${WEIGHTS:-mbc_core/weights}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} TOKENIZERS_PARALLELISM=false TORCHINDUCTOR_COMPILE_THREADS=${THREADS:-4}
ends=$(($(date +%s) + SECONDS_LEFT))
mkdir -p "$OUT"

finished() { grep -qs '"finished": true' "$OUT/$1/card.json"; }
after() { # NAME: wait for it, as long as the call's time is not over
  until finished "$1"; do
    if [ "$(date +%s)" -ge "$ends" ]; then return 1; fi
    sleep 2
  done
}

# run NAME options…: until it is finished, or the call's time is over less what measuring takes.
run() {
  local name=$1 left questions sets=() set
  shift
  if finished "$name"; then return; fi
  case $name in sweep_*) questions=${SWEEP_QUESTIONS:-200} ;; *) questions=$QUESTIONS ;; esac
  left=$(awk "BEGIN {print ($ends - $(date +%s) - ${MEASURE:-70}) / 60}")
  if awk "BEGIN {exit !($left < ${LEAST:-0.2})}"; then return; fi
  for set in $SETS; do
    if [ -f "$DATA/$set.safetensors" ]; then sets+=(--evaluate "$set=$DATA/$set.safetensors"); fi
  done
  "$PY" -m mbc_core.cli.train paper "$DATA/train.safetensors" --encoder "$ENCODER" --lm "$LM" \
    ${GGUF:+--gguf "$GGUF"} --out "$OUT/$name" --call-minutes "$left" --documents 64 --questions 2 \
    "${sets[@]}" --evaluate-questions "$questions" "$@" $EXTRA >"$OUT/$name.out" 2>>"$OUT/$name.log"
  echo "$(date +%T) $name $(tail -c 200 "$OUT/$name.out")"
}

# One limit for all gradients and a slow beta2 serve address codes a little better (`clips` in results/paper.txt); learned
# ones were thrown back with them, since their passages' gradients rule the common norm.
address="--codes address --rank 12 --prefix-hidden 512 --slot-marks"
address="$address --burst ${ADDRESS_BURST:-0} --beta2 ${ADDRESS_BETA2:-0.999}"
address12="$address --tokens 12 --codebook $WEIGHTS/codebook_t12.safetensors"
address24="$address --tokens 24 --codebook $WEIGHTS/codebook_t24.safetensors"
# Chosen on a small task on a CPU: with the paper's λ = 1 and usage decay .99 one passage in sixteen shares its row of codes
# with another after 200 steps, and 30 codewords live; with these none does, and 400 live. Slot marks helped only codes
# that are the same in every slot; learned ones are read as the paper does.
# Its 576-wide parts learn at 3/5 of the rates that address models (384 wide) do.
learned="--codes learned --codebook-by ${BY:-ema} --freeze-encoder --lambda-vq 0.1 --usage-decay 0.9 --no-slot-marks"
learned="$learned --lr ${LR:-3e-4} --lora-lr ${LORA_LR:-4e-4} --beta2 ${BETA2:-0.98}"
# Small banks first, and words asked for before answers: without them no code was read after 200 steps. The rates fall
# over the second half of STEPS, or of a run's minutes where a slow machine makes those come first.
course="--steps $STEPS --cool-down ${COOL:-0.5} --banks 1,4,16,64 --grow-every ${GROW:-150} --cue-steps ${CUES:-500}"
course="$course --look-every ${LOOK:-125} --flat ${FLAT:-0.002}"
fixed="--steps $SWEEP --cool-down 0.3 --flat 0 --minutes 0 --look-every 100 --banks 1,4,16,64 --grow-every 60"
fixed="$fixed --cue-steps 200"

lane1() { run learned $learned $course --minutes "${MAIN_MINUTES:-9}"; }
lane2() { run address_t24 $address24 $course --minutes "${ADDRESS_MINUTES:-6}"; }
lane3() {
  run address_t12 $address12 $course --minutes "${ADDRESS_MINUTES:-6}"
  finished address_t12 && run address_closed $address12 $course --closed --like "$OUT/address_t12"
}
lane4() { after learned && run learned_closed $learned $course --closed --like "$OUT/learned"; }
lane5() { after learned && run mac_kv_lora $learned $course --no-quantize --like "$OUT/learned"; }
lane6() { # the paper's MAC has no KV-LoRA: its closed book has none either
  run mac $learned $course --no-quantize --no-kv-lora --minutes "${MAC_MINUTES:-2.5}"
  finished mac && run mac_closed $learned $course --no-quantize --no-kv-lora --closed --like "$OUT/mac"
}

# What the limits of the gradients and beta2 do, each alone and both: the same steps, rates and data.
clips() {
  local burst beta2 own="--steps ${CLIP_STEPS:-600} --cool-down 0 --flat 0 --minutes 0 --look-every 100"
  own="$own --banks 1,4,16,64 --grow-every 100 --cue-steps 200"
  for burst in 3 0; do
    for beta2 in 0.98 0.999; do
      SETS= LEAST=0.2 MEASURE=5 run "clip_${burst}_$beta2" $address12 $own --burst $burst --beta2 $beta2 &
    done
  done
  wait
}

# Sweeps: JOBS at a time, the most wanted first; none starts that the call's time does not hold. All have the same steps
# and rates, so what one finds depends on no other. They are at one small budget and are not converged.
sweep() {
  case $1 in
    base) run sweep_base $learned $fixed ;;
    no_reset) run sweep_no_reset $learned $fixed --no-reset ;;
    no_kv_lora) run sweep_no_kv_lora $learned $fixed --no-kv-lora ;;
    no_vq) run sweep_no_vq $learned $fixed --no-quantize ;;
    k128) run sweep_k128 $learned $fixed --codewords 128 ;;
    k2048) run sweep_k2048 $learned $fixed --codewords 2048 ;;
    t24) run sweep_t24 $learned $fixed --tokens 24 ;;
    lambda1) run sweep_lambda1 $learned $fixed --lambda-vq 1 ;;
    usage99) run sweep_usage99 $learned $fixed --usage-decay 0.99 ;;
    gradient) run sweep_gradient $learned $fixed --codebook-by gradient ;;
    standardize_off) run sweep_standardize_off $learned $fixed --no-standardize ;;
    one_clip) run sweep_one_clip $learned $fixed --burst 0 --beta2 0.999 ;;
    address_plain) run sweep_address_plain $address24 $fixed --no-slot-marks ;;
    address_marks) run sweep_address_marks $address24 $fixed ;;
  esac
}
sweeps() {
  local one
  for one in ${SWEEPS:-base no_reset no_kv_lora no_vq k128 k2048 t24 lambda1 usage99 gradient standardize_off one_clip \
    address_plain address_marks}; do
    while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-4}" ]; do wait -n; done
    LEAST=${SWEEP_LEAST:-1.2} MEASURE=${SWEEP_MEASURE:-15} sweep "$one" &
  done
  wait
}

# One line a run: step, held-out loss with the right bank / another one, the same for banks of one, codes used.
look() {
  local file
  for file in "$OUT"/*/curve.jsonl; do
    tail -n 1 "$file" | "$PY" -c 'import json, sys
told = json.loads(sys.stdin.read() or "{}")
names = "step seconds held_out_loss held_out_shuffled held_out_loss_of_one held_out_shuffled_of_one held_out_used".split()
print(sys.argv[1].split("/")[-2].ljust(22), *(name.replace("held_out_", "") + " " + str(told.get(name)) for name in names))' "$file"
  done
}

case "${1:-all}" in
  all)
    for lane in 1 2 3 4 5 6; do "lane$lane" & done
    wait
    sweeps ;;
  main) lane1 ;;
  lane[1-6] | sweeps | clips) "$1" ;;
  look) look; exit ;;
  try) # a minute each of two kinds, to see how fast they are and whether they read
    for one in "try_learned $learned" "try_address $address24"; do
      SETS= run $one $course --minutes "${TRY_MINUTES:-1}" --look-every 50 --flat 0 &
    done ;;
  *) echo "usage: paper_runs.sh all|main|lane1|…|lane6|sweeps|clips|look|try" >&2; exit 2 ;;
esac
wait
