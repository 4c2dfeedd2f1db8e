// What tests may ask of libfake_nccl.so, next to NCCL's own functions. For tests only.
#ifndef SMP_TF_KERNELS_TESTS_FAKE_NCCL_H_
#define SMP_TF_KERNELS_TESTS_FAKE_NCCL_H_

#include "../gpu_abi.h"

namespace smp {

// Of this process, since it began.
struct FakeNcclCounts {
  int communicators;  // alive
  int aborts;
  int operations;  // sends, receives and sums that were put on streams
  int launches;    // how often: those of a group go at once
  int mismatches;  // receives of another size than what was sent
  int mistakes;    // calls that NCCL would refuse, or come to grief of
};

}  // namespace smp

extern "C" {
void fake_nccl_counts(smp::FakeNcclCounts* counts);

// What ncclCommGetAsyncError says from now on, of all communicators of this process.
// FAKE_NCCL_ASYNC_ERROR in the environment does the same from the beginning.
void fake_nccl_inject(smp::NcclResult result);

// The next operation is refused with this result.
void fake_nccl_refuse(smp::NcclResult result);
}

#endif  // SMP_TF_KERNELS_TESTS_FAKE_NCCL_H_
