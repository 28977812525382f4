#!/usr/bin/env bash
# Builds the C and C++ clients against the static, the shared, the installed library and through pkg-config, and runs
# them; then the clients of devices, over the host executor by $CC and clang, and by nvcc for GPUs. Needs cmake and a C
# compiler ($CC, else cc). C++, pkg-config, clang and nvcc ($NVCC, $CUDACXX, the one of PATH, or that of
# csrc/cuda/install-nvcc.sh) join where they are found. What can't run is SKIPPED, and counted. The build folder is
# temporary unless one is named: run.sh DIR.
set -euo pipefail
cd "$(dirname "$0")"
csrc=$(cd ../../../csrc && pwd)
built=${1:-$(mktemp -d)}
[ $# -gt 0 ] || trap 'rm -rf "$built"' EXIT
mkdir -p "$built"
export CC=${CC:-cc}
cc=$CC
jobs=$(getconf _NPROCESSORS_ONLN)
quietly() { "$@" >"$built/log" 2>&1 || { cat "$built/log"; exit 1; }; }
: >"$built/said"
say() { "$@" | tee -a "$built/said"; }

# The flags of build.rs and those of csrc/CMakeLists.txt, one line a file suffix.
of_cargo=$(tr '\n' ' ' <../../../build.rs | grep -oE '"(x86_64|aarch64)", *"_[a-z0-9]+", *"[^"]*"' | tr -d '",' | tr -s ' ')
cat >"$built/table.cmake" <<'SCRIPT'
file(STRINGS "${CSRC}/CMakeLists.txt" rows REGEX "^set\\(q3n_(isas_)?(x86_64|aarch64|avx[0-9a-z]*|neon[a-z]*) ")
foreach(row IN LISTS rows)
  cmake_language(EVAL CODE "${row}")
endforeach()
foreach(arch x86_64 aarch64)
  foreach(isa IN LISTS q3n_isas_${arch})
    string(JOIN " " row ${arch} _${isa} ${q3n_${isa}})
    execute_process(COMMAND ${CMAKE_COMMAND} -E echo "${row}")
  endforeach()
endforeach()
SCRIPT
of_cmake=$(cmake "-DCSRC=$csrc" -P "$built/table.cmake")
if [ "$(sed 's/ *$//' <<<"$of_cargo")" != "$of_cmake" ]; then
  printf 'build.rs and csrc/CMakeLists.txt give different flags:\n%s\n\n%s\n' "$of_cargo" "$of_cmake"
  exit 1
fi

of_cargo=$(sed -n 's/.*const ARCHS.*\[\(.*\)\];/\1/p' ../../../build.rs | tr -d '",')
gpus=$(sed -n 's/.*set(CMAKE_CUDA_ARCHITECTURES \(.*\))$/\1/p' "$csrc/CMakeLists.txt" | sed 's/-real//g')
[ "$of_cargo" = "$gpus" ] || { echo "build.rs is for GPUs of $of_cargo, csrc/CMakeLists.txt of $gpus"; exit 1; }

. ../../isa_flags.sh
while read -r arch suffix flags; do
  if [ "$(echo $(isa_flags "x$suffix.c" "$arch"))" != "$flags" ]; then
    echo "verify/isa_flags.sh and build.rs give different flags for $arch $suffix"
    exit 1
  fi
done <<<"$of_cmake"

echo "-- $($cc --version | head -1): add_subdirectory, static and shared"
quietly cmake -S . -B "$built/sub" -DQ3N_SHARED=ON -DQ3N_INSTALL=ON \
  -DCMAKE_BUILD_TYPE=Release -DCMAKE_INSTALL_PREFIX="$built/prefix" -DCMAKE_INSTALL_LIBDIR=lib
quietly cmake --build "$built/sub" -j"$jobs"
(cd "$built/sub" && ctest --output-on-failure)
for program in "$built"/sub/{layer,layer_cxx,misuse}_shared; do [ ! -x "$program" ] || "$program"; done
"$built/sub/reload" "$built/sub/q3n/libq3n.so" "$built/sub/libq3n_next.so"

# The bindings that CI compares with q3n.h list its functions; `static inline` ones are not among them.
declared() { grep -oE 'pub fn q3n_[a-z0-9_]+' ../../../src/ffi.rs | cut -d' ' -f3 | sort -u; }
# exports_are LIBRARY NAMES
exports_are() {
  local exported others
  exported=$(nm -D --defined-only "$1" | awk '$2 == "T" { print $3 }' | sed 's/@.*//' | sort -u)
  others=$(nm -D --defined-only "$1" | awk '$2 != "T" && $2 != "A" { print $3 }')
  if [ "$2" != "$exported" ] || [ -n "$others" ]; then
    diff <(echo "$2") <(echo "$exported") || true
    echo "$others"
    exit 1
  fi
  echo "$(wc -l <<<"$exported") functions, no data"
}
echo "-- exports of the shared library: what q3n.h declares, but for CUDA"
exports_are "$built/sub/q3n/libq3n.so" "$(declared | grep -v _cuda)"
abi=$(sed -n 's/^#define Q3N_ABI_VERSION //p' "$csrc/base/operator.h")
[[ $(readelf -d "$built/sub/q3n/libq3n.so") == *"[libq3n.so.$abi]"* ]] || { echo "soname and ABI differ"; exit 1; }

echo "-- installed: find_package"
quietly cmake --install "$built/sub"
quietly cmake -S . -B "$built/found" -DQ3N_INSTALLED=ON -DCMAKE_PREFIX_PATH="$built/prefix"
quietly cmake --build "$built/found" -j"$jobs"
(cd "$built/found" && ctest --output-on-failure)
# refused PREFIX OPTION: find_package must not take the package installed there.
refused() {
  rm -rf "$built/refused"
  if cmake -S . -B "$built/refused" -DQ3N_INSTALLED=ON -DCMAKE_PREFIX_PATH="$1" "$2" >"$built/log" 2>&1; then
    echo "find_package took $1 with $2"
    exit 1
  fi
}
refused "$built/prefix" -DQ3N_WANTED=0.2
refused "$built/prefix" -DQ3N_COMPONENTS=cuda

if command -v pkg-config >/dev/null; then
  echo "-- installed: pkg-config"
  export PKG_CONFIG_PATH="$built/prefix/lib/pkgconfig"
  $cc -std=c11 -D_GNU_SOURCE layer.c -o "$built/layer" $(pkg-config --cflags --libs q3n) -lm -lpthread -Wl,-rpath,"$built/prefix/lib"
  "$built/layer"
  $cc -std=c11 misuse.c -o "$built/misuse" $(pkg-config --cflags q3n) "$built/prefix/lib/libq3n.a" -lm
  "$built/misuse" | tail -1
fi

# subfolder NAME OPTION...: the clients, those of devices among them, with csrc as a subfolder; in the folder NAME.
subfolder() {
  local name=$1 program
  shift
  quietly cmake -S . -B "$built/$name" -DCMAKE_BUILD_TYPE=Release -DCMAKE_INSTALL_LIBDIR=lib \
    -DCMAKE_INSTALL_PREFIX="$built/$name/prefix" "$@"
  quietly cmake --build "$built/$name" -j"$jobs"
  (cd "$built/$name" && ctest --output-on-failure)
  for program in "$built/$name"/device_{layer,misuse}_{static,shared}; do [ ! -x "$program" ] || say "$program"; done
}
# installed NAME COMPONENT FLAGS OPTION...: what subfolder NAME built, installed and found by a project that knows C
# alone; then through pkg-config, with these flags.
installed() {
  local name=$1 component=$2 flags=$3 prefix=$built/$1/prefix
  shift 3
  quietly cmake --install "$built/$name"
  quietly cmake -S . -B "$built/$name/found" -DQ3N_INSTALLED=ON -DQ3N_C_ALONE=ON -DCMAKE_PREFIX_PATH="$prefix" \
    -DQ3N_COMPONENTS="$component" "$@"
  quietly cmake --build "$built/$name/found" -j"$jobs"
  (cd "$built/$name/found" && ctest --output-on-failure)
  command -v pkg-config >/dev/null || return 0
  local -x PKG_CONFIG_PATH=$prefix/lib/pkgconfig
  $cc -std=c11 device_layer.c -o "$built/$name/device_layer" $flags $(pkg-config --cflags q3n) \
    $(pkg-config --static --libs q3n | sed 's/-lq3n/-l:libq3n.a/')
  say "$built/$name/device_layer"
}

if ! command -v c++ >/dev/null; then
  say echo "SKIPPED the host executor: no C++ compiler"
else
  echo "-- $($cc --version | head -1), kernels over the host executor: add_subdirectory, static, installed, pkg-config"
  subfolder host -DQ3N_CUDA_HOST=ON -DQ3N_INSTALL=ON
  installed host cuda_host ""
  refused "$built/host/prefix" -DQ3N_COMPONENTS=cuda
fi

if command -v clang >/dev/null && command -v clang++ >/dev/null; then
  echo "-- $(clang --version | head -1), kernels over the host executor: add_subdirectory, shared"
  CC=clang CXX=clang++ subfolder clang -DQ3N_CUDA_HOST=ON -DQ3N_STATIC=OFF -DQ3N_SHARED=ON
  exports_are "$built/clang/q3n/libq3n.so" "$(declared | grep -vE '_cuda(_scratch_bytes|_report|_driver_missing)?$')"
fi

nvcc=${NVCC:-${CUDACXX:-$(command -v nvcc || echo ../../../target/cuda/nvidia/cu13/bin/nvcc)}}
if ! [ -x "$nvcc" ]; then
  say echo "SKIPPED kernels for GPUs: no nvcc"
else
  root=$(cd "$(dirname "$(readlink -f "$nvcc")")/.." && pwd)
  rooms="causal_conv gated_delta layer norm"
  echo "-- $("$nvcc" --version | grep release), kernels for GPUs of $rooms alone: add_subdirectory, installed, pkg-config"
  CUDACXX=$root/bin/nvcc subfolder gpu -DQ3N_CUDA=ON -DQ3N_CUDA_OPERATORS="${rooms// /;}" \
    -DCMAKE_CUDA_ARCHITECTURES=90a-real -DCUDAToolkit_ROOT="$root" -DQ3N_SHARED=ON -DQ3N_INSTALL=ON
  names=$(for room in $rooms; do sed -n 's/^Q3N_DECLARE_CUDA([a-z_]*, \([a-z_]*\)).*/\1/p' "$csrc/$room"/*.h; done)
  exports_are "$built/gpu/q3n/libq3n.so" "$({
    declared | grep -v _cuda
    printf 'q3n_cuda_report\nq3n_cuda_driver_missing\n'
    printf 'q3n_%s_cuda\n' $names
    printf 'q3n_%s_cuda_scratch_bytes\n' $names
  } | sort)"
  needed=$(readelf -d "$built/gpu/q3n/libq3n.so" | grep NEEDED)
  [[ $needed != *libcu* ]] || { echo "$needed"; exit 1; }
  installed gpu cuda "-I$root/include" -DCUDAToolkit_ROOT="$root"
  # Where there is a GPU: a launch that fails for want of one.
  CUDA_VISIBLE_DEVICES= say "$built/gpu/device_misuse_static"
fi
echo "C and C++ clients: all passed, $(grep -c '^SKIPPED' "$built/said" || true) SKIPPED"
