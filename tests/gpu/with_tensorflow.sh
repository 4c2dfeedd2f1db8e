#!/usr/bin/env bash
# The conformance tests and the digits example on the GPU, two ranks and more on one of
# them if there is only one; run.sh calls it where TensorFlow can use a GPU.
#
#   usage: PYTHON=... NCCL_LIBRARY=.../libnccl.so.2 tests/gpu/with_tensorflow.sh
#
# Exit status: 0 all is well, 1 a test failed, 3 nothing was run, and why.
set -euo pipefail
cd "$(dirname "$0")/../.."

needs="horovod pytest pytest_timeout tf_keras libucx sklearn scipy hypothesis psutil"
lacks=""
for name in $needs; do
  "$PYTHON" -c "import importlib.util as u, sys; sys.exit(not u.find_spec('$name'))" ||
    lacks="$lacks $name"
done
[ -z "$lacks" ] || {
  echo "not run: the conformance tests and the example; $PYTHON lacks$lacks" \
    "(make setup installs them)"
  exit 3
}
"$PYTHON" setup.py -q build_ext --inplace

export LD_LIBRARY_PATH="$(dirname "$NCCL_LIBRARY")${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export TF_CPP_MIN_LOG_LEVEL=3 TF_USE_LEGACY_KERAS=1
# pytest's own process computes what is compared with, on the same GPU, bit for bit.
export TF_FORCE_GPU_ALLOW_GROWTH=true TF_DETERMINISTIC_OPS=1
export NCCL_MULTI_RANK_GPU_ENABLE=1 SMP_CONFIG='{"share_gpu": true}'
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0,1}" TESTS_ON_GPU=real

status=0
"$PYTHON" -m pytest -q tests/conformance || status=1
PATH="$(dirname "$("$PYTHON" -c 'import sys; print(sys.executable)')"):$PATH" \
  timeout 600 horovodrun --gloo -np 2 "$PYTHON" -m smp_tf.examples.digits || status=1
"$PYTHON" -m smp_tf info
exit $status
