#!/usr/bin/env bash
# One night: ingest what came in, adapt the reader's adapter, one run at a time.
#
#   nightly.sh all      one machine: ingest, adapt
#   nightly.sh set      two machines, the one with the bank: ingest, write the training set to MBC_EXCHANGE
#   nightly.sh train    two machines, the one with the GPU: train on the newest set; needs no bank, torch and peft alone
#   nightly.sh add      the one with the bank again: take the candidate in, let the gate decide
#   nightly.sh compact  once a week: merge small files, drop what is superseded or expired
#
# Environment (all but MBC_BANK may be left out):
#   MBC_BANK      folder, s3://... or gs://...: the bank
#   MBC_WORK      folder for what a killed night goes on from (/var/lib/mbc)
#   MBC_INBOX     local folder whose files are ingested, then moved to MBC_WORK/done
#   MBC_SOURCES   or sources as `mbc ingest` takes them, one word each; %Y-%m-%d and the like become yesterday's date
#   MBC_EXCHANGE  two machines: a folder both see (MBC_WORK/exchange)
#   MBC_MINUTES   training time (10)    MBC_DEVICE  cpu, cuda or auto (auto)
#
# Exit codes: 0 done, also when the gate kept the old adapter; 1 failed, run it again; 2 wrong use, look at the message;
# 75 another run is still going on, nothing was done. Standard output has one JSON object a step, standard error the log.
set -euo pipefail

step=${1:-all}
work=${MBC_WORK:-/var/lib/mbc}
exchange=${MBC_EXCHANGE:-$work/exchange}
minutes=${MBC_MINUTES:-10}
device=${MBC_DEVICE:-auto}

say() { printf '%s nightly %s: %s\n' "$(date -u +%FT%TZ)" "$step" "$*" >&2; }

bank() {
  if [[ -z ${MBC_BANK:-} ]]; then
    say "MBC_BANK is not set: name the bank"
    exit 2
  fi
}

ingest() {
  local sources=()
  if [[ -n ${MBC_INBOX:-} ]]; then
    # Files that a dead run took are still there. A file that was written to a moment ago may not be whole yet.
    mkdir -p "$work/taken" "$work/done"
    find "$MBC_INBOX" -maxdepth 1 -type f -mmin +1 ! -name '.*' ! -name '*.tmp' ! -name '*.part' \
      -exec mv -n -t "$work/taken" {} +
    if [[ -n $(find "$work/taken" -type f -print -quit) ]]; then
      sources=("$work/taken")
    fi
  elif [[ -n ${MBC_SOURCES:-} ]]; then
    read -ra sources <<< "$(date -u -d yesterday "+$MBC_SOURCES")"
  fi
  if (( ${#sources[@]} == 0 )); then
    say "no new documents"
    return
  fi
  say "ingesting ${sources[*]}"
  mbc ingest "${sources[@]}" --bank "$MBC_BANK" --device "$device" --json
  if [[ -n ${MBC_INBOX:-} ]]; then
    local night
    night=$work/done/$(date -u +%Y%m%dT%H%M%SZ)
    mv "$work/taken" "$night"
  fi
}

newest() { # the newest set that has $1 and lacks $2
  local one
  for one in $(find "$exchange" -maxdepth 1 -name 'set-*' -type d | sort -r); do
    if [[ -e $one/$1 && ! -e $one/$2 ]]; then
      printf '%s\n' "$one"
      return
    fi
    if [[ -e $one/$2 ]]; then return; fi # older ones are out of date
  done
}

write_set() {
  local target
  target=$exchange/set-$(date -u +%Y%m%dT%H%M%SZ)
  rm -rf "$exchange"/writing-* && mkdir -p "$exchange/writing-$$"
  mbc adapt --bank "$MBC_BANK" --write-set "$exchange/writing-$$/set.jsonl.gz" --device "$device" --json
  mv "$exchange/writing-$$" "$target" # whole or not there
  say "wrote $target"
  find "$exchange" -maxdepth 1 -name 'set-*' -type d | sort | head -n -7 | xargs -r rm -r
}

train() {
  local found
  mkdir -p "$work"
  found=$(newest set.jsonl.gz candidate)
  if [[ -z $found ]]; then
    say "no new set in $exchange"
    return
  fi
  say "training on $found"
  mbc adapt --from-set "$found/set.jsonl.gz" --out "$found/candidate.writing" --minutes "$minutes" \
    --checkpoint "$work/checkpoint-$(basename "$found")" --device "$device" --json
  mv "$found/candidate.writing" "$found/candidate"
  rm -rf "$work"/checkpoint-set-*
}

add() {
  local found
  found=$(newest candidate added)
  if [[ -z $found ]]; then
    say "no new candidate in $exchange"
    return
  fi
  say "taking $found in"
  touch "$found/added" # first: a candidate that lost a race was stored, and must not be stored again
  mbc adapters add "$found/candidate" --bank "$MBC_BANK" --json
}

mkdir -p "$work" "$exchange"
lock=$step
if [[ $step == set ]]; then lock=all; fi # both ingest
exec 9> "$work/nightly-$lock.lock"
if ! flock -n 9; then
  say "another run is still going on"
  exit 75
fi
case $step in
  all)
    bank
    ingest
    mbc adapt --bank "$MBC_BANK" --minutes "$minutes" --checkpoint "$work/checkpoint" --device "$device" --json
    ;;
  set)
    bank
    ingest
    write_set
    ;;
  train) train ;;
  add)
    bank
    add
    ;;
  compact)
    bank
    mbc compact --bank "$MBC_BANK" --json
    ;;
  *)
    say "unknown step; use all, set, train, add or compact"
    exit 2
    ;;
esac
say "done"
