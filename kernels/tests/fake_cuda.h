// What tests may ask of libfake_cuda.so, next to CUDA's own functions. For tests only.
#ifndef SMP_TF_KERNELS_TESTS_FAKE_CUDA_H_
#define SMP_TF_KERNELS_TESTS_FAKE_CUDA_H_

#include <cstdlib>

#include "../gpu_abi.h"

namespace smp {

using CudaHostFunction = void (*)(void* argument);  // CUhostFn

// Mistakes are said on stderr as well, unless a test makes them on purpose.
inline bool FakeIsQuiet() { return std::getenv("FAKE_GPU_QUIET") != nullptr; }

// Of this process, since it began.
struct FakeCudaCounts {
  int contexts_pushed;  // and not popped again, on all threads
  int streams;          // alive
  int events;           // alive
  int allocations;      // not freed
  int mistakes;         // calls that were refused
};

}  // namespace smp

extern "C" {
void fake_cuda_counts(smp::FakeCudaCounts* counts);

// Of CUDA's driver, but not of struct Cuda.
smp::CudaResult cuLaunchHostFunc(smp::CudaStream stream, smp::CudaHostFunction call,
                                 void* argument);
smp::CudaResult cuCtxGetCurrent(smp::CudaContext* context);
smp::CudaResult cuCtxSynchronize();
smp::CudaResult cuStreamSynchronize(smp::CudaStream stream);
}

#endif  // SMP_TF_KERNELS_TESTS_FAKE_CUDA_H_
