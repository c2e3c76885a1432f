#!/usr/bin/env bash
# Everything that a release's weights and tables need from GPUs, side by side on the cards of one machine: both rivals, `attend` and
# its closed book, the paper's models and sweeps, and all answers. Steps wait for one another; run it again to go on where it was
# cut off: trainings resume, kept answers are not asked again. Two H200 take about 40 minutes (its parts were run, not the whole).
#
#   tests/bench/eval_sheets.sh …                 # before, where banks can be built: the question sheets
#   WORK=build/gpu TRAIN=qa_train.jsonl.gz PLAIN="news.jsonl leads.jsonl" SQUAD=qa_dev.jsonl.gz DATED=qa_stream_dated.jsonl.gz \
#     ENCODER=MiniLM LM=SmolLM2 SHEETS=build/sheets SETS_DATA=build/paper-sets tests/bench/gpu_runs.sh
#
#   WORK       gets prepared data, weights (none text attend attend_closed paper/…), keep/ (answers), tables/, log/, done/ (what is over)
#   TRAIN, PLAIN  training files with questions, and without: `attend` learns words from them
#   SQUAD, DATED  what is measured on      SETS_DATA  of `bench_paper data`; without it the paper's tables are left out
#   STEPS      of both rivals, as many as the reader had      ATTEND_MINUTES, PAPER_SECONDS  how long those trainings may take
#   PYTHON, DEVICE, GPUS (numbers, such as "0 1")
set -u
: "${WORK:?}" "${TRAIN:?}" "${SQUAD:?}" "${DATED:?}" "${ENCODER:?}" "${LM:?}" "${SHEETS:?}"
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} STEPS=${STEPS:-800} PLAIN=${PLAIN:-} SETS_DATA=${SETS_DATA:-}
ATTEND_MINUTES=${ATTEND_MINUTES:-7.5} PAPER_SECONDS=${PAPER_SECONDS:-1700} WEIGHTS=${WEIGHTS:-mbc_core/weights}
read -ra gpus <<<"${GPUS:-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | tr '\n' ' ')}"
first=${gpus[0]:-} last=${gpus[*]: -1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} TOKENIZERS_PARALLELISM=false TORCHINDUCTOR_COMPILE_THREADS=4
mkdir -p "$WORK"/{done,log,keep,tables,prepared,paper-data}
began=$(date +%s)

done_with() { touch "$WORK/done/$1" && echo "$(($(date +%s) - began)) s: $1"; }
wait_for() { # until these are over; a step that failed never is, and whoever waits for it says so
  local one
  for one in "$@"; do
    until [ -e "$WORK/done/$one" ]; do
      if [ -e "$WORK/done/$one.failed" ]; then echo "not done, since $one failed: see $WORK/log/$one.log" >&2; return 1; fi
      sleep 1
    done
  done
}
once() { # NAME GPU command…: unless it is over
  local name=$1 gpu=$2
  shift 2
  if [ -e "$WORK/done/$name" ]; then return; fi
  rm -f "$WORK/done/$name.failed"
  if CUDA_VISIBLE_DEVICES=$gpu "$@" >"$WORK/log/$name.out" 2>"$WORK/log/$name.log"; then done_with "$name"; else
    touch "$WORK/done/$name.failed"
    echo "$name failed: $(tail -n 1 "$WORK/log/$name.log")" >&2
    return 1
  fi
}
train() { once "$1" "$2" "$PYTHON" -m mbc_core.cli.train "${@:3}"; }

prepare() {
  local with=(--encoder "$ENCODER" --salience "$WEIGHTS/salience.safetensors" --device "$DEVICE")
  train train "$first" prepare "$TRAIN" "${with[@]}" --out "$WORK/prepared/train" &
  # shellcheck disable=SC2086
  if [ -n "$PLAIN" ]; then train plain "$last" prepare $PLAIN "${with[@]}" --out "$WORK/prepared/plain"; fi
  train dev "$last" prepare "$DATED" "${with[@]}" --out "$WORK/prepared/dev" --dev --source realtimeqa --source realtimeqa_news
  wait
}
common=(--lm "$LM" --lexicon "$WEIGHTS/lexicon.json.gz" --codebook "$WEIGHTS/codebook_t24.safetensors"
  --rotation "$WEIGHTS/rotation.safetensors" --device "$DEVICE")
rival() { # none or text, GPU: equal to the reader in data, steps, batch and seed
  wait_for train && train "$1" "${2:-}" reader "$WORK/prepared/train" "${common[@]}" --memory "$1" --out "$WORK/$1" --minutes 0 --steps "$STEPS"
}
attend() {
  local from=("$WORK/prepared/train") steps
  wait_for train dev ${PLAIN:+plain} || return
  if [ -n "$PLAIN" ]; then from+=("$WORK/prepared/plain"); fi
  from+=("${common[@]}" --codebook "$WEIGHTS/codebook_t12.safetensors" --encoder "$ENCODER" --start "$WEIGHTS/reader"
    --evaluate "rt_dev=$WORK/prepared/dev")
  train attend "$last" attend "${from[@]}" --out "$WORK/attend" --minutes "$ATTEND_MINUTES" || return
  steps=$("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["progress"]["step"])' "$WORK/attend/card.json")
  train attend_closed "$last" attend "${from[@]}" --closed --out "$WORK/attend_closed" --minutes 0 --steps "$steps"
}

paper_data() {
  local with=(--encoder "$ENCODER" --lm "$LM" --rotation "$WEIGHTS/rotation.safetensors" --device "$DEVICE"
    --codebook "$WEIGHTS/codebook_t12.safetensors" --codebook "$WEIGHTS/codebook_t24.safetensors") to=$WORK/paper-data
  train set_squad "$last" paper-data "$SQUAD" "${with[@]}" --only source=squad_dev --out "$to/squad.safetensors" &
  train set_archivalqa "$last" paper-data "$DATED" "${with[@]}" --only source=archivalqa --only split=test \
    --out "$to/archivalqa.safetensors" &
  wait_for train && train set_train "$first" paper-data "$WORK/prepared/train" "${with[@]}" --out "$to/train.safetensors"
  wait
}
lane() { # GPU, words of paper_runs.sh, its environment
  local gpu=$1 words=$2
  shift 2
  env CUDA_VISIBLE_DEVICES="$gpu" DATA="$WORK/paper-data" ENCODER="$ENCODER" LM="$LM" OUT="$WORK/paper" PY="$PYTHON" WEIGHTS="$WEIGHTS" \
    SECONDS_LEFT=$((PAPER_SECONDS + began - $(date +%s))) "$@" tests/bench/paper_runs.sh "$words" >"$WORK/log/paper_$words.log" 2>&1
}
paper() {
  wait_for set_train set_squad set_archivalqa || return
  local learned="STEPS=3300 FLAT=0 MAIN_MINUTES=0 LORA_LR=7e-4 COOL=0.25 GROW=200 CUES=600 LOOK=250"
  local address="STEPS=4000 FLAT=0 ADDRESS_MINUTES=0 COOL=0.2 GROW=150 CUES=400 LOOK=200"
  local mac="STEPS=2500 FLAT=0 MAC_MINUTES=0 LORA_LR=7e-4 COOL=0.4 GROW=150 CUES=500 LOOK=250"
  # shellcheck disable=SC2086
  {
    lane "$first" lane1 $learned &
    lane "$first" lane2 $address &
    (lane "$last" lane3 $address; lane "$last" clips; lane "$last" sweeps JOBS=3) &
    lane "$last" lane4 $learned &
    lane "$first" lane5 $learned &
    lane "$last" lane6 $mac &
  }
  wait
  done_with paper
}

answers() { # GPU, sheet, options: each sheet keeps its answers in a file of its own
  once "answers_$2" "$1" "$PYTHON" -m mbc_core.cli eval --from-reads "$SHEETS/$2.gz" --lm "$LM" --device "$DEVICE" \
    --keep-answers "$WORK/keep/$2.jsonl" "${@:3}"
}
tables() {
  local rivals=(--rival-text "$WORK/text" --rival-closed "$WORK/none")
  (wait_for attend attend_closed &&
    for one in attend_news attend_squad; do answers "$last" $one --attend "$WORK/attend" --rival-closed "$WORK/attend_closed"; done) &
  if wait_for none text; then
    (answers "$first" squad "${rivals[@]}") &
    (for one in news retention_news retention_squad; do answers "$last" $one "${rivals[@]}"; done) &
  fi
  wait
}
paper_tables() {
  if [ -z "$SETS_DATA" ]; then return; fi
  wait_for none text paper && once paper_tables "$first" env DATA="$SETS_DATA" LM="$LM" ENCODER="$ENCODER" MODELS="$WORK/paper" \
    CLOSED="$WORK/none" TEXT="$WORK/text" OUT="$WORK/tables" PYTHON="$PYTHON" tests/bench/paper_tables.sh
}

for step in prepare "rival text $first" "rival none $last" attend paper_data paper tables paper_tables; do $step & done
wait
! compgen -G "$WORK/done/*.failed" >/dev/null
