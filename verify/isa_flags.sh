# Sourced by scripts that compile csrc without cargo; build.rs has the same table.
# isa_flags FILE [TARGET]: flags of a file by the instruction set in its name; a failure for one that the target lacks.
avx512='-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl'
isa_flags() {
  case "${2:-$(uname -m)} $1" in
    x86_64*_neon*.c | aarch64*_avx*.c) return 1 ;;
    *_neondot.c) echo -march=armv8.2-a+dotprod ;;
    *_avx512vnni.c) echo $avx512 -mavx512vnni ;;
    *_avx512bf16.c) echo $avx512 -mavx512vnni -mavx512bf16 ;;
    *_avx512.c) echo $avx512 ;;
    *_avx2.c) echo -mavx2 -mfma -mf16c ;;
  esac
}

# compile_all COMPILER FOLDER FILE FLAG...: csrc and FILE to objects in FOLDER, as many at a time as there are cores.
compile_all() {
  local compiler=$1 folder=$2 own=$3 target file isa job jobs=() failed=0
  shift 3
  target=$("$compiler" -dumpmachine)
  for file in csrc/*/*.c "$own"; do
    isa=$(isa_flags "$file" "$target") || continue
    [ "$(jobs -rp | wc -l)" -lt "$(nproc)" ] || wait -n || true
    "$compiler" -std=c11 -D_GNU_SOURCE "$@" $isa -c "$file" -o "$folder/$(basename "$file").o" &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job" || failed=1; done
  return $failed
}
