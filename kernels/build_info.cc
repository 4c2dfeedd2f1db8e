// What the library was built for. smp_tf/transport/ops.py reads this text from the file
// before it loads it: one that was built for another TensorFlow may crash at load.
#ifndef SMP_TENSORFLOW_VERSION
#define SMP_TENSORFLOW_VERSION "none"
#endif
#ifndef SMP_UCX_VERSION
#define SMP_UCX_VERSION "unknown"
#endif

extern "C" __attribute__((visibility("default"), used)) const char smp_build_info[] =
    "smp_tf kernels: tensorflow=" SMP_TENSORFLOW_VERSION " ucx=" SMP_UCX_VERSION ";";
