#!/usr/bin/env bash
# The paper's tables on one GPU: four processes side by side, each keeping its answers, then the tables from them all.
# Run again to go on: what is in OUT is not asked again.
#
#   DATA=sets LM=SmolLM2 ENCODER=MiniLM MODELS=build/paper CLOSED=adapter TEXT=adapter OUT=build/tables tests/bench/paper_tables.sh
#
# MODELS holds folders of `mbc train paper`; those that are not there are left out. SHIPPED is a folder with the release's
# paper_t12 and paper_t24, for rows of their own beside those of MODELS. PYTHON is the interpreter; EXTRA are
# more options of `bench_paper run`, such as "--documents 3 --first 2" for a rehearsal, TUNE of `bench_paper tune`.
set -u
: "${DATA:?}" "${LM:?}" "${ENCODER:?}" "${MODELS:?}" "${CLOSED:?}" "${TEXT:?}"
PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/tables}
EXTRA=${EXTRA:-}
SHIPPED=${SHIPPED:-}
TUNE=${TUNE:-}
mkdir -p "$OUT"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} TOKENIZERS_PARALLELISM=false

bench() { "$PYTHON" -m tests.bench.bench_paper "$@"; }

# options of one family: its closed book, then its rows (name of the row = folder)
family() {
  local one=$1 row folder book=""
  shift
  options=()
  if [ -f "$MODELS/${one}_closed/paper.json" ]; then
    options+=(--paper-closed "$one-closed=$MODELS/${one}_closed")
    book=",$one-closed"
  fi
  for row in "$@"; do
    folder="$MODELS/${row#*=}"
    if [ -f "$folder/paper.json" ]; then options+=(--paper "${row%%=*}=$folder$book"); fi
  done
}
family learned mbc-learned-t12=learned mac-kv-lora-t12=mac_kv_lora
learned=("${options[@]}")
family mac mac-t12=mac
learned+=("${options[@]}")
family address mbc-address-t12=address_t12 mbc-address-t24=address_t24
address=("${options[@]}")
for tokens in 12 24; do
  if [ -n "$SHIPPED" ] && [ -f "$SHIPPED/paper_t$tokens/paper.json" ]; then
    address+=(--paper "shipped-address-t$tokens=$SHIPPED/paper_t$tokens")
  fi
done

run() { # keep file, further options
  local keep=$1
  shift
  # shellcheck disable=SC2086
  bench run --data "$DATA" --lm "$LM" --closed "$CLOSED" --text "$TEXT" --encoder "$ENCODER" --keep "$OUT/$keep.jsonl" \
    $EXTRA "$@"
}

tuned_lane() { # weighting: its learning rate, then its rows
  # shellcheck disable=SC2086
  [ -f "$OUT/tuned-$1.json" ] || bench tune --data "$DATA" --lm "$LM" --closed "$CLOSED" --weighting "$1" \
    --keep "$OUT/tune-$1.jsonl" --out "$OUT/tuned-$1.json" $TUNE || return 1
  run "$1" --group "$1" --tuned "$OUT/tuned-$1.json"
}

tuned_lane uniform > "$OUT/uniform.log" 2>&1 &
lanes=($!)
tuned_lane salient > "$OUT/salient.log" 2>&1 &
lanes+=($!)
{ [ ${#learned[@]} = 0 ] || run learned --group paper "${learned[@]}"; } > "$OUT/learned.log" 2>&1 &
lanes+=($!)
{ run text --group closed --group text && { [ ${#address[@]} = 0 ] || run address --group paper "${address[@]}"; }; } \
  > "$OUT/address.log" 2>&1 &
lanes+=($!)
failed=0
for lane in "${lanes[@]}"; do wait "$lane" || failed=1; done

cat "$OUT"/{uniform,salient,learned,text,address}.jsonl > "$OUT/answers.jsonl" 2> /dev/null
tuned=()
for kind in uniform salient; do [ -f "$OUT/tuned-$kind.json" ] && tuned+=(--tuned "$OUT/tuned-$kind.json"); done
if [ "$failed" = 0 ]; then
  run answers "${learned[@]}" "${address[@]}" "${tuned[@]}" --json "$OUT/report.json" --markdown "$OUT/report.md" || failed=1
fi
tail -n 3 "$OUT"/*.log
exit "$failed"
