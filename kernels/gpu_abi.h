// The part of the binary interfaces of CUDA's driver and of NCCL that is used here.
//
// Both libraries are loaded at run time, where there are any, and the build must not
// need them: TensorFlow's wheel has no nccl.h, and NCCL's is 300 MB. What is declared
// here has been the same since CUDA 11 and NCCL 2.7, as both promise;
// tests/gpu/abi_check.cc compares it with the headers of a machine that has them.
//
// Sources: "CUDA Driver API" and "NCCL API" reference, docs.nvidia.com.
#ifndef SMP_TF_KERNELS_GPU_ABI_H_
#define SMP_TF_KERNELS_GPU_ABI_H_

#include <cstddef>
#include <cstdint>

namespace smp {

// --- CUDA driver (libcuda.so.1)

using CudaResult = int;  // CUresult
constexpr CudaResult kCudaSuccess = 0;
constexpr CudaResult kCudaNotReady = 600;

using CudaDevice = int;                     // CUdevice
using CudaContext = struct CudaContextTag*;  // CUcontext
using CudaStream = struct CudaStreamTag*;    // CUstream and cudaStream_t
using CudaEvent = struct CudaEventTag*;      // CUevent
using CudaAddress = unsigned long long;      // CUdeviceptr

struct CudaUuid {  // CUuuid
  char bytes[16];
};

constexpr unsigned kCudaStreamNonBlocking = 1;  // apart from the default stream
constexpr unsigned kCudaEventDisableTiming = 2;

// --- NCCL (libnccl.so.2)

using NcclResult = int;  // ncclResult_t
constexpr NcclResult kNcclSuccess = 0;
constexpr NcclResult kNcclInProgress = 7;

using NcclComm = struct NcclCommTag*;  // ncclComm_t

struct NcclId {  // ncclUniqueId
  char bytes[128];
};

// ncclDataType_t
enum NcclType : int {
  kNcclInt8 = 0,
  kNcclUint8 = 1,
  kNcclInt32 = 2,
  kNcclUint32 = 3,
  kNcclInt64 = 4,
  kNcclUint64 = 5,
  kNcclFloat16 = 6,
  kNcclFloat32 = 7,
  kNcclFloat64 = 8,
  kNcclBfloat16 = 9,
};

// ncclRedOp_t
enum NcclReduction : int { kNcclSum = 0, kNcclProd = 1, kNcclMax = 2, kNcclMin = 3 };

}  // namespace smp

#endif  // SMP_TF_KERNELS_GPU_ABI_H_
