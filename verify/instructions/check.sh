#!/usr/bin/env bash
# Counts the instructions of every SIMD variant (count.c) and compares with the baseline of this compiler: more than 3 %
# above it fails. check.sh --update writes the baseline. README.md says more.
set -euo pipefail
cd "$(dirname "$0")/../.."
. verify/isa_flags.sh
compiler=${CC:-gcc}
version=$("$compiler" -dumpversion)
baseline=verify/instructions/$(uname -m)-$(basename "$compiler")-${version%%.*}.tsv
if [ "$(uname -m)" != x86_64 ]; then
  echo "SKIPPED: instructions are counted on x86-64 only"
  exit 0
fi

built=$(mktemp -d)
trap 'rm -r "$built"' EXIT
# As build.rs compiles them.
compile_all "$compiler" "$built" verify/instructions/count.c -O3 -ffp-contract=off -fno-math-errno -fvisibility=hidden
"$compiler" "$built"/*.o -lm -o "$built/count"
"$built/count" >"$built/counts"

if [ "${1:-}" = --update ]; then
  if grep SKIPPED "$built/counts"; then
    echo "not written: a baseline needs a machine with every instruction set"
    exit 1
  fi
  cp "$built/counts" "$baseline"
  echo "$(wc -l <"$baseline") counts written to $baseline"
elif [ ! -f "$baseline" ]; then
  echo "SKIPPED: no baseline $baseline (check.sh --update writes one)"
else
  awk -F'\t' '
    /^SKIPPED/ { split($0, word, /[ :]+/); absent[word[2] " " word[3]] = 1; print; next }
    { key = $1 " " $2 " " $3 }
    FILENAME == ARGV[1] { before[key] = $4; variant[key] = $1 " " $2; next }
    !(key in before) { print key ": " $4 " instructions, not in the baseline"; bad++; next }
    { seen[key] = 1; n++; change = 100 * ($4 / before[key] - 1) }
    change > 3 || change < -3 { printf "%s: %d instructions, %+.1f %% of %d\n", key, $4, change, before[key] }
    change > 3 { bad++ }
    change < -3 { better++ }
    END {
      for (key in before) if (!(key in seen)) {
        if (variant[key] in absent) { skipped++ } else { print key ": in the baseline, not counted"; bad++ }
      }
      printf "%d counts compared, %d failed, %d below the baseline, %d skipped\n", n, bad, better, skipped
      if (bad) print "If the change is meant: verify/instructions/check.sh --update"
      exit bad > 0
    }' "$baseline" "$built/counts"
fi
