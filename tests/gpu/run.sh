#!/usr/bin/env bash
# The transport between GPUs, on a machine that has one: correctness, failures, and its
# speed beside that of NCCL alone. Needs CUDA (libcuda.so.1, cuda.h), NCCL >= 2.30, a C++
# compiler and Python; neither TensorFlow nor UCX, and nothing of ours is installed. Where
# TensorFlow's GPU build can be imported, the conformance tests and an example follow.
#
#   usage: tests/gpu/run.sh [--fake]
#
# Two ranks share the first GPU, or take the first two. Looked for, in this order:
#   cuda.h  CUDA_HOME, /usr/local/cuda, Python's packages
#   NCCL    NCCL_HOME, Python's packages, the system, pip (nvidia-nccl-cu12, -cu13)
# --fake: fakes of CUDA and NCCL over the memory of the host take the place of both, for
# machines without a GPU. They prove that all of this builds and runs, and measure nothing.
#
# What is built and the logs stay in build/gpu. What is not run is said at the end, in a
# line that begins with "not run:", and the last line has the medians:
#   bandwidth_64mb_ratio=0.97 latency_ratio=1.12    (at least 0.95, at most 1.3)
# Exit status: 0 all is well, 1 a test failed or a ratio is off, 2 something is missing.
set -euo pipefail
cd "$(dirname "$0")/../.."

fake=""
case "${1:-}" in
  "") ;;
  --fake) fake=1 ;;
  *) echo "usage: $0 [--fake]" >&2; exit 2 ;;
esac

missing() { echo "tests/gpu: $*" >&2; exit 2; }

if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
cxx=${CXX:-g++}
command -v "$PYTHON" >/dev/null || missing "no Python; PYTHON=$PYTHON"
command -v "$cxx" >/dev/null || missing "no C++ compiler; CXX=$cxx"
out=$PWD/build/gpu${fake:+_fake}
mkdir -p "$out"

# --- what there is

# The folders of Python's packages, and TensorFlow's own CUDA headers.
packages() {
  "$PYTHON" -c 'import site, sys
print(*dict.fromkeys([*site.getsitepackages(), site.getusersitepackages(),
                      *filter(None, sys.path)]), sep="\n")'
}

first() {  # of the paths that exist
  local path
  for path in "$@"; do [ -e "$path" ] && { echo "$path"; return; }; done
  true
}

find_cuda_headers() {
  local header
  header=$(first ${CUDA_HOME:+"$CUDA_HOME/include/cuda.h"} \
    /usr/local/cuda/include/cuda.h /usr/include/cuda.h)
  if [ -z "$header" ]; then
    local folder
    while read -r folder; do
      header=$(first "$folder"/nvidia/{cu13,cu12,cuda_runtime}/include/cuda.h \
        "$folder"/tensorflow/include/third_party/gpus/cuda/include/cuda.h)
      [ -n "$header" ] && break
    done < <(packages)
  fi
  [ -n "$header" ] && dirname "$header" || true
}

find_nccl() {  # its library, and the folder of its header
  local folder library
  if [ -n "${NCCL_HOME:-}" ]; then
    library=$(first "$NCCL_HOME"/lib{,64}/libnccl.so{.2,})
    [ -n "$library" ] && is_new "$NCCL_HOME/include" &&
      echo "$library" "$NCCL_HOME/include"
    return 0
  fi
  while read -r folder; do
    folder=$folder/nvidia/nccl
    [ -e "$folder/lib/libnccl.so.2" ] && is_new "$folder/include" && {
      echo "$folder/lib/libnccl.so.2" "$folder/include"; return; }
  done < <(echo "$out"; packages)
  # To its end: ldconfig fails, and with it the script, when nobody reads any more.
  library=$(ldconfig -p 2>/dev/null |
    awk '/libnccl\.so\.2/ && !found {found = $NF} END {print found}')
  [ -n "$library" ] && is_new /usr/include && echo "$library" /usr/include || true
}

is_new() {  # whether the nccl.h of a folder is of 2.30 or later
  [ -e "$1/nccl.h" ] && awk '/define NCCL_MAJOR/ {major = $3} /define NCCL_MINOR/ {
    minor = $3} END {exit !(major > 2 || (major == 2 && minor >= 30))}' "$1/nccl.h"
}

cuda_headers=$(find_cuda_headers)
if [ -n "$fake" ]; then
  nccl_headers=$(find_nccl | awk '{print $2}')
else
  why_not=$("$PYTHON" - <<'PYTHON'
import ctypes
try:
    cuda, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    result = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    print("" if count.value else f"no GPU: CUDA's driver gives error {result}")
except OSError as error:
    print(f"no GPU: CUDA's driver does not load: {error}")
PYTHON
  )
  [ -z "$why_not" ] || missing "$why_not; --fake runs the same over fakes"
  [ -n "$cuda_headers" ] || missing "no cuda.h; install CUDA, or set CUDA_HOME"
  read -r nccl_library nccl_headers < <(find_nccl; echo)
  if [ -z "$nccl_library" ] && [ -z "${NCCL_HOME:-}" ]; then
    for package in nvidia-nccl-cu12 nvidia-nccl-cu13; do
      echo "no NCCL >= 2.30 here; pip installs $package into $out"
      "$PYTHON" -m pip install -q --no-deps --target "$out" "$package>=2.30" && break
    done
    read -r nccl_library nccl_headers < <(find_nccl; echo)
  fi
  [ -n "$nccl_library" ] ||
    missing "no NCCL >= 2.30${NCCL_HOME:+; NCCL_HOME=$NCCL_HOME}; set NCCL_HOME to" \
      "one, or unset it and pip install nvidia-nccl-cu12"
fi

# --- build

flags=(-std=c++17 $([ -n "$fake" ] && echo -O1 || echo -O2) -g -Wall -Wextra -Werror -pthread)
sources=(kernels/{ticket,gpu_libraries,gpu_device,nccl_stream,nccl_lane,nccl_group}.cc
  kernels/{nccl_transport,nccl_progress}.cc kernels/tests/processes.cc
  tests/gpu/machine.cc)

check_abi() {  # with the compiler's further arguments
  "$cxx" -std=c++17 -fsyntax-only "$@" tests/gpu/abi_check.cc
}

system=()
if [ -n "$cuda_headers" ]; then
  # The second one is where TensorFlow has a part of what CUDA has in the first.
  system=(-isystem "$cuda_headers" -isystem "$cuda_headers/../libcudacxx/include")
  check_abi "${system[@]}"
  echo "ok   the ABI that is declared is that of $cuda_headers/cuda.h"
else
  echo "     no cuda.h: the ABI of CUDA is not compared"
fi
if [ -n "$cuda_headers" ] && [ -n "$nccl_headers" ]; then
  check_abi "${system[@]}" -isystem "$nccl_headers" -DSMP_WITH_NCCL
  echo "ok   the ABI that is declared is that of $nccl_headers/nccl.h"
else
  echo "     no nccl.h >= 2.30: the ABI of NCCL is not compared"
fi

objects=()
for source in "${sources[@]}" tests/gpu/correctness.cc tests/gpu/speed.cc; do
  object=$out/$(basename "$source" .cc).o
  [[ $source == tests/gpu/[cs]* ]] || objects+=("$object")
  while [ "$(jobs -rp | wc -l)" -ge "$(nproc)" ]; do wait -n; done
  "$cxx" "${flags[@]}" -c "$source" -o "$object" &
done
for job in $(jobs -p); do wait "$job"; done
for program in correctness speed; do
  "$cxx" "${flags[@]}" "$out/$program.o" "${objects[@]}" -ldl -o "$out/$program"
done

if [ -n "$fake" ]; then
  make -s -f kernels/tests/Makefile OUT="$out" fakes
  arguments=(--small --cuda "$out/libfake_cuda.so" --nccl "$out/libfake_nccl.so")
else
  arguments=(--nccl "$nccl_library")
fi

# --- run

export NCCL_MULTI_RANK_GPU_ENABLE=1
timeout 600 "$out/correctness" "${arguments[@]}"
timeout 600 "$out/speed" "${arguments[@]}" | tee "$out/speed.log"
ratios=$(grep '^bandwidth_64mb_ratio=' "$out/speed.log")

status=0
if [ -z "$fake" ]; then
  awk -F'[= ]' '{exit !($2 >= 0.95 && $4 <= 1.3)}' <<<"$ratios" || {
    echo "tests/gpu: a ratio is off: at least 0.95, at most 1.3" >&2; status=1; }
  has_gpu='import tensorflow as tf; assert tf.config.list_physical_devices("GPU")'
  if TF_CPP_MIN_LOG_LEVEL=3 "$PYTHON" -c "$has_gpu" 2>"$out/tensorflow.log"; then
    PYTHON=$PYTHON NCCL_LIBRARY=$nccl_library tests/gpu/with_tensorflow.sh ||
      { [ $? -eq 3 ] || status=1; }
  else
    echo "not run: the conformance tests and the example; TensorFlow sees no GPU here, or" \
      "is not there: $(tail -n1 "$out/tensorflow.log")"
  fi
fi
echo "$ratios"
exit $status
