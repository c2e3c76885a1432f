#!/usr/bin/env bash
# The question sheets of a release's tables (see `mbc eval --write-reads`): banks are built through the pipeline, no GPU is needed.
# Minutes on two cores. gpu_runs.sh answers them.
#
#   SQUAD=qa_dev.jsonl.gz DATED=qa_stream_dated.jsonl.gz OUT=build/sheets tests/bench/eval_sheets.sh
set -eu
: "${SQUAD:?}" "${DATED:?}" "${OUT:?}"
MBC=${MBC:-mbc} EXTRA=${EXTRA:-}
mkdir -p "$OUT"
all=closed,closed-equal,shuffled,recall,first-words,truncated,text-codes,text,text-equal,right,right-text,right-text-equal
stream=closed,closed-equal,shuffled,recall,text-equal
vectors=closed,closed-equal,attend-closed,attend-shuffled,attend,attend-right

sheet() { # NAME, options: unless it is there
  if [ -e "$OUT/$1.gz" ]; then return; fi
  # shellcheck disable=SC2086
  $MBC eval "${@:2}" --write-reads "$OUT/.$1.gz" $EXTRA && mv "$OUT/.$1.gz" "$OUT/$1.gz"
}
squad=(--qa "$SQUAD")
news=(--qa "$DATED" --only "source=realtimeqa,realtimeqa_news" --only split=test)
sheet squad "${squad[@]}" --k 5 --reads $all
sheet news "${news[@]}" --k 5 --reads $all
sheet retention_squad "${squad[@]}" --k 5 --retention --reads $stream
sheet retention_news "${news[@]}" --k 5 --retention --reads $stream
sheet attend_squad "${squad[@]}" --k 5 --profiles compact --reads $vectors
sheet attend_news "${news[@]}" --k 5 --profiles compact --reads $vectors
