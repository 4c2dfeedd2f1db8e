// Compares kernels/gpu_abi.h, and the functions of kernels/gpu_libraries.h, with the
// headers of CUDA and, with -DSMP_WITH_NCCL, of NCCL. It is compiled, never run: what
// does not agree is an error.
#include <cuda.h>
#ifdef SMP_WITH_NCCL
#include <nccl.h>
#endif

#include <type_traits>

#include "../../kernels/gpu_libraries.h"

namespace {

template <typename Type>
constexpr bool kIsNumber = std::is_integral_v<Type> || std::is_enum_v<Type>;

// Whether a value can be passed as the other type: of the same size, and both a
// pointer, both a number, or both a structure.
template <typename One, typename Other>
constexpr bool kSameValue =
    sizeof(One) == sizeof(Other) && alignof(One) == alignof(Other) &&
    std::is_pointer_v<One> == std::is_pointer_v<Other> &&
    kIsNumber<One> == kIsNumber<Other> && std::is_trivially_copyable_v<One> &&
    std::is_trivially_copyable_v<Other>;

template <typename One, typename Other>
struct SameCall : std::false_type {};

template <typename OneResult, typename... One, typename OtherResult, typename... Other>
struct SameCall<OneResult (*)(One...), OtherResult (*)(Other...)> {
  static constexpr bool Compare() {
    if constexpr (sizeof...(One) == sizeof...(Other)) {
      return kSameValue<OneResult, OtherResult> && (kSameValue<One, Other> && ...);
    } else {
      return false;
    }
  }
  static constexpr bool value = Compare();
};

#define SAME_SIZE(ours, theirs) \
  static_assert(sizeof(ours) == sizeof(theirs) && alignof(ours) == alignof(theirs))
#define SAME_NUMBER(ours, theirs) \
  static_assert(static_cast<int>(ours) == static_cast<int>(theirs))
// By the names that are looked up, as cuda.h has older ones of the same functions.
#define SAME_CALL(library, ours, theirs) \
  static_assert(SameCall<decltype(smp::library::ours), decltype(&theirs)>::value)

SAME_SIZE(smp::CudaResult, CUresult);
SAME_SIZE(smp::CudaDevice, CUdevice);
SAME_SIZE(smp::CudaContext, CUcontext);
SAME_SIZE(smp::CudaStream, CUstream);
SAME_SIZE(smp::CudaEvent, CUevent);
SAME_SIZE(smp::CudaUuid, CUuuid);
static_assert(std::is_same_v<smp::CudaAddress, CUdeviceptr>);
SAME_NUMBER(smp::kCudaSuccess, CUDA_SUCCESS);
SAME_NUMBER(smp::kCudaNotReady, CUDA_ERROR_NOT_READY);
SAME_NUMBER(smp::kCudaStreamNonBlocking, CU_STREAM_NON_BLOCKING);
SAME_NUMBER(smp::kCudaEventDisableTiming, CU_EVENT_DISABLE_TIMING);

SAME_CALL(Cuda, Init, cuInit);
SAME_CALL(Cuda, DriverGetVersion, cuDriverGetVersion);
SAME_CALL(Cuda, DeviceGetCount, cuDeviceGetCount);
SAME_CALL(Cuda, DeviceGet, cuDeviceGet);
SAME_CALL(Cuda, DeviceGetName, cuDeviceGetName);
SAME_CALL(Cuda, DeviceGetUuid, cuDeviceGetUuid_v2);
SAME_CALL(Cuda, DeviceGetPCIBusId, cuDeviceGetPCIBusId);
SAME_CALL(Cuda, DeviceTotalMem, cuDeviceTotalMem_v2);
SAME_CALL(Cuda, DevicePrimaryCtxRetain, cuDevicePrimaryCtxRetain);
SAME_CALL(Cuda, CtxPushCurrent, cuCtxPushCurrent_v2);
SAME_CALL(Cuda, CtxPopCurrent, cuCtxPopCurrent_v2);
SAME_CALL(Cuda, StreamCreate, cuStreamCreate);
SAME_CALL(Cuda, StreamDestroy, cuStreamDestroy_v2);
SAME_CALL(Cuda, StreamWaitEvent, cuStreamWaitEvent);
SAME_CALL(Cuda, EventCreate, cuEventCreate);
SAME_CALL(Cuda, EventDestroy, cuEventDestroy_v2);
SAME_CALL(Cuda, EventRecord, cuEventRecord);
SAME_CALL(Cuda, EventQuery, cuEventQuery);
SAME_CALL(Cuda, MemAlloc, cuMemAlloc_v2);
SAME_CALL(Cuda, MemFree, cuMemFree_v2);
SAME_CALL(Cuda, GetErrorString, cuGetErrorString);

#ifdef SMP_WITH_NCCL
static_assert(NCCL_VERSION_CODE >= NCCL_VERSION(2, 30, 0),
              "two ranks on one GPU need NCCL 2.30");
SAME_SIZE(smp::NcclResult, ncclResult_t);
SAME_SIZE(smp::NcclComm, ncclComm_t);
SAME_SIZE(smp::NcclId, ncclUniqueId);
SAME_SIZE(smp::NcclType, ncclDataType_t);
SAME_SIZE(smp::NcclReduction, ncclRedOp_t);
SAME_NUMBER(smp::kNcclSuccess, ncclSuccess);
SAME_NUMBER(smp::kNcclInProgress, ncclInProgress);
SAME_NUMBER(smp::kNcclInt8, ncclInt8);
SAME_NUMBER(smp::kNcclUint8, ncclUint8);
SAME_NUMBER(smp::kNcclInt32, ncclInt32);
SAME_NUMBER(smp::kNcclUint32, ncclUint32);
SAME_NUMBER(smp::kNcclInt64, ncclInt64);
SAME_NUMBER(smp::kNcclUint64, ncclUint64);
SAME_NUMBER(smp::kNcclFloat16, ncclFloat16);
SAME_NUMBER(smp::kNcclFloat32, ncclFloat32);
SAME_NUMBER(smp::kNcclFloat64, ncclFloat64);
SAME_NUMBER(smp::kNcclBfloat16, ncclBfloat16);
SAME_NUMBER(smp::kNcclSum, ncclSum);
SAME_NUMBER(smp::kNcclProd, ncclProd);
SAME_NUMBER(smp::kNcclMax, ncclMax);
SAME_NUMBER(smp::kNcclMin, ncclMin);

SAME_CALL(Nccl, GetVersion, ncclGetVersion);
SAME_CALL(Nccl, GetUniqueId, ncclGetUniqueId);
SAME_CALL(Nccl, CommInitRank, ncclCommInitRank);
SAME_CALL(Nccl, CommDestroy, ncclCommDestroy);
SAME_CALL(Nccl, CommAbort, ncclCommAbort);
SAME_CALL(Nccl, CommGetAsyncError, ncclCommGetAsyncError);
SAME_CALL(Nccl, Send, ncclSend);
SAME_CALL(Nccl, Recv, ncclRecv);
SAME_CALL(Nccl, AllReduce, ncclAllReduce);
SAME_CALL(Nccl, GroupStart, ncclGroupStart);
SAME_CALL(Nccl, GroupEnd, ncclGroupEnd);
SAME_CALL(Nccl, GetErrorString, ncclGetErrorString);
SAME_CALL(Nccl, GetLastError, ncclGetLastError);
#endif

}  // namespace
