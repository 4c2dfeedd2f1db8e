// CUDA's driver and NCCL, loaded when they are first asked for.
#ifndef SMP_TF_KERNELS_GPU_LIBRARIES_H_
#define SMP_TF_KERNELS_GPU_LIBRARIES_H_

#include <string>

#include "gpu_abi.h"

namespace smp {

// Functions of libcuda.so.1. The names are those of the driver API without "cu" and
// without the number of a version.
struct Cuda {
  std::string path;     // of the library that was loaded
  std::string why_not;  // why it cannot be used; empty: it can

  CudaResult (*Init)(unsigned flags) = nullptr;
  CudaResult (*DriverGetVersion)(int* version) = nullptr;  // 12040: 12.4
  CudaResult (*DeviceGetCount)(int* count) = nullptr;
  CudaResult (*DeviceGet)(CudaDevice* device, int ordinal) = nullptr;
  CudaResult (*DeviceGetName)(char* name, int length, CudaDevice device) = nullptr;
  CudaResult (*DeviceGetUuid)(CudaUuid* uuid, CudaDevice device) = nullptr;
  CudaResult (*DeviceGetPCIBusId)(char* id, int length, CudaDevice device) = nullptr;
  CudaResult (*DeviceTotalMem)(size_t* bytes, CudaDevice device) = nullptr;
  CudaResult (*DevicePrimaryCtxRetain)(CudaContext*, CudaDevice device) = nullptr;
  CudaResult (*CtxPushCurrent)(CudaContext context) = nullptr;
  CudaResult (*CtxPopCurrent)(CudaContext* context) = nullptr;
  CudaResult (*StreamCreate)(CudaStream* stream, unsigned flags) = nullptr;
  CudaResult (*StreamDestroy)(CudaStream stream) = nullptr;
  CudaResult (*StreamWaitEvent)(CudaStream, CudaEvent, unsigned flags) = nullptr;
  CudaResult (*EventCreate)(CudaEvent* event, unsigned flags) = nullptr;
  CudaResult (*EventDestroy)(CudaEvent event) = nullptr;
  CudaResult (*EventRecord)(CudaEvent event, CudaStream stream) = nullptr;
  CudaResult (*EventQuery)(CudaEvent event) = nullptr;
  CudaResult (*MemAlloc)(CudaAddress* address, size_t bytes) = nullptr;
  CudaResult (*MemFree)(CudaAddress address) = nullptr;
  CudaResult (*GetErrorString)(CudaResult result, const char** text) = nullptr;

  bool usable() const { return why_not.empty(); }
  std::string Text(CudaResult result) const;
};

// Functions of libnccl.so.2, named without "nccl". A communicator belongs to the device
// whose context is current when it is made.
struct Nccl {
  std::string path;
  std::string why_not;
  int version = 0;  // 23003: 2.30.3

  NcclResult (*GetVersion)(int* version) = nullptr;
  NcclResult (*GetUniqueId)(NcclId* id) = nullptr;
  NcclResult (*CommInitRank)(NcclComm*, int size, NcclId id, int rank) = nullptr;
  NcclResult (*CommDestroy)(NcclComm comm) = nullptr;
  NcclResult (*CommAbort)(NcclComm comm) = nullptr;
  NcclResult (*CommGetAsyncError)(NcclComm comm, NcclResult* error) = nullptr;
  NcclResult (*Send)(const void* data, size_t count, NcclType, int peer, NcclComm,
                     CudaStream) = nullptr;
  NcclResult (*Recv)(void* data, size_t count, NcclType, int peer, NcclComm,
                     CudaStream) = nullptr;
  NcclResult (*AllReduce)(const void* from, void* to, size_t count, NcclType,
                          NcclReduction, NcclComm, CudaStream) = nullptr;
  NcclResult (*GroupStart)() = nullptr;
  NcclResult (*GroupEnd)() = nullptr;
  const char* (*GetErrorString)(NcclResult result) = nullptr;
  const char* (*GetLastError)(NcclComm comm) = nullptr;

  bool usable() const { return why_not.empty(); }
  std::string Text(NcclResult result, NcclComm comm = nullptr) const;
};

// Never destroyed: the libraries' own threads outlive main().
const Cuda& GetCuda();
const Nccl& GetNccl();

// The same from other files: the tests have their own libraries.
Cuda LoadCuda(const char* file);
Nccl LoadNccl(const char* file);

}  // namespace smp

#endif  // SMP_TF_KERNELS_GPU_LIBRARIES_H_
