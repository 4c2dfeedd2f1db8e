#!/usr/bin/env bash
# Tests of the engine, without TensorFlow: plain, with the address and undefined-behaviour
# sanitizers, and with the thread sanitizer. What is built stays in build/kernel_tests.
#
#   usage: kernels/tests/run.sh [plain|address|thread ...]      (default: all three)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
[ -x .venv/bin/python ] && python=${PYTHON:-.venv/bin/python}
read -r ucx_include ucx_lib < <("$python" -c "import setup; print(*setup.find_ucx()[1:])")

run() {  # mode, sanitizers
  echo "engine tests: $1"
  make -s -j2 -f kernels/tests/Makefile OUT="$PWD/build/kernel_tests/$1" SANITIZE="$2" \
    UCX_INCLUDE="$ucx_include" UCX_LIB="$ucx_lib"
}

# UCX patches mmap and friends in place, as the sanitizers do. cma reads the memory of
# another process, whose addresses the sanitizers take for ours. And what UCX itself keeps
# until the end is not ours to free, hence detect_leaks=0 below.
sanitized() { UCX_MEM_EVENTS=n UCX_TLS=^cma,sysv,cuda run "$@"; }

for mode in "${@:-plain address thread}"; do
  for one in $mode; do
    case $one in
      plain) run plain "" ;;
      address) ASAN_OPTIONS=detect_leaks=0 sanitized address address,undefined ;;
      thread) sanitized thread thread ;;
      *) echo "usage: $0 [plain|address|thread ...]" >&2; exit 2 ;;
    esac
  done
done
