#!/usr/bin/env bash
# Builds the C and C++ clients against the static, the shared, the installed library and through pkg-config, then again
# with clang where there is one, and runs them. Needs cmake and a C compiler ($CC, else cc); the C++ client, pkg-config and
# clang join where they are found. The build folder is temporary unless one is named: run.sh DIR.
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

echo "-- exports of the shared library: what q3n.h declares"
# The bindings that CI compares with q3n.h list its functions; `static inline` ones are not among them. CUDA
# kernels are not part of these targets.
declared=$(grep -oE 'pub fn q3n_[a-z0-9_]+' ../../../src/ffi.rs | cut -d' ' -f3 | grep -v _cuda | sort -u)
exported=$(nm -D --defined-only "$built/sub/q3n/libq3n.so" | awk '$2 == "T" { print $3 }' | sed 's/@.*//' | sort -u)
others=$(nm -D --defined-only "$built/sub/q3n/libq3n.so" | awk '$2 != "T" && $2 != "A" { print $3 }')
if [ "$declared" != "$exported" ] || [ -n "$others" ]; then
  diff <(echo "$declared") <(echo "$exported") || true
  echo "$others"
  exit 1
fi
echo "$(wc -l <<<"$exported") functions, no data"

echo "-- installed: find_package"
quietly cmake --install "$built/sub"
quietly cmake -S . -B "$built/found" -DQ3N_INSTALLED=ON -DCMAKE_PREFIX_PATH="$built/prefix"
quietly cmake --build "$built/found" -j"$jobs"
(cd "$built/found" && ctest --output-on-failure)
if cmake -S . -B "$built/refused" -DQ3N_INSTALLED=ON -DCMAKE_PREFIX_PATH="$built/prefix" -DQ3N_WANTED=0.2 >"$built/log" 2>&1; then
  echo "a wrong version was accepted"
  exit 1
fi

if command -v pkg-config >/dev/null; then
  echo "-- installed: pkg-config"
  export PKG_CONFIG_PATH="$built/prefix/lib/pkgconfig"
  $cc -std=c11 -D_GNU_SOURCE layer.c -o "$built/layer" $(pkg-config --cflags --libs q3n) -lm -lpthread -Wl,-rpath,"$built/prefix/lib"
  "$built/layer"
  $cc -std=c11 misuse.c -o "$built/misuse" $(pkg-config --cflags q3n) "$built/prefix/lib/libq3n.a" -lm
  "$built/misuse" | tail -1
fi

if command -v clang >/dev/null && command -v clang++ >/dev/null; then
  echo "-- $(clang --version | head -1): add_subdirectory, static"
  quietly env CC=clang CXX=clang++ cmake -S . -B "$built/clang" -DCMAKE_BUILD_TYPE=Release
  quietly cmake --build "$built/clang" -j"$jobs"
  (cd "$built/clang" && ctest --output-on-failure)
fi
echo "C and C++ clients: all passed"
