#include "gpu_libraries.h"

#include <dlfcn.h>
#include <link.h>

namespace smp {
namespace {

// The first with ncclGetLastError; ncclSend and ncclRecv came with 2.7.
constexpr int kOldestNccl = 21300;

std::string LastDlError() {
  const char* text = dlerror();
  return text == nullptr ? "no reason given" : text;
}

std::string PathOf(void* handle) {
  struct link_map* map = nullptr;
  if (dlinfo(handle, RTLD_DI_LINKMAP, &map) != 0 || map == nullptr) return "";
  return map->l_name == nullptr ? "" : map->l_name;
}

// Opens a library and looks up its functions; the first that is missing is why_not.
class Loader {
 public:
  Loader(const char* file, std::string* path, std::string* why_not)
      : handle_(dlopen(file, RTLD_NOW | RTLD_LOCAL)), why_not_(why_not) {
    if (handle_ == nullptr) {
      *why_not = LastDlError();
    } else {
      *path = PathOf(handle_);
    }
  }

  template <typename Function>
  void Find(const char* name, Function* function) {
    if (handle_ == nullptr) return;
    *function = reinterpret_cast<Function>(dlsym(handle_, name));
    if (*function == nullptr && why_not_->empty()) {
      *why_not_ = std::string("it has no ") + name + "; it is too old";
    }
  }

 private:
  void* const handle_;  // never closed
  std::string* const why_not_;
};

}  // namespace

std::string Cuda::Text(CudaResult result) const {
  const char* text = nullptr;
  if (GetErrorString != nullptr) GetErrorString(result, &text);
  return std::string("CUDA: ") + (text == nullptr ? "unknown error" : text) + " (" +
         std::to_string(result) + ")";
}

std::string Nccl::Text(NcclResult result, NcclComm comm) const {
  std::string text = "NCCL: ";
  text += GetErrorString == nullptr ? "unknown error" : GetErrorString(result);
  text += " (" + std::to_string(result) + ")";
  const char* more = GetLastError == nullptr ? nullptr : GetLastError(comm);
  if (more != nullptr && *more != '\0') text += std::string(": ") + more;
  return text;
}

Cuda LoadCuda(const char* file) {
  Cuda cuda;
  Loader loader(file, &cuda.path, &cuda.why_not);
  loader.Find("cuInit", &cuda.Init);
  loader.Find("cuDriverGetVersion", &cuda.DriverGetVersion);
  loader.Find("cuDeviceGetCount", &cuda.DeviceGetCount);
  loader.Find("cuDeviceGet", &cuda.DeviceGet);
  loader.Find("cuDeviceGetName", &cuda.DeviceGetName);
  // Since CUDA 11.4; the one before gives the parts of a GPU all the same.
  loader.Find("cuDeviceGetUuid_v2", &cuda.DeviceGetUuid);
  loader.Find("cuDeviceGetPCIBusId", &cuda.DeviceGetPCIBusId);
  loader.Find("cuDeviceTotalMem_v2", &cuda.DeviceTotalMem);
  loader.Find("cuDevicePrimaryCtxRetain", &cuda.DevicePrimaryCtxRetain);
  loader.Find("cuCtxPushCurrent_v2", &cuda.CtxPushCurrent);
  loader.Find("cuCtxPopCurrent_v2", &cuda.CtxPopCurrent);
  loader.Find("cuStreamCreate", &cuda.StreamCreate);
  loader.Find("cuStreamDestroy_v2", &cuda.StreamDestroy);
  loader.Find("cuStreamWaitEvent", &cuda.StreamWaitEvent);
  loader.Find("cuEventCreate", &cuda.EventCreate);
  loader.Find("cuEventDestroy_v2", &cuda.EventDestroy);
  loader.Find("cuEventRecord", &cuda.EventRecord);
  loader.Find("cuEventQuery", &cuda.EventQuery);
  loader.Find("cuMemAlloc_v2", &cuda.MemAlloc);
  loader.Find("cuMemFree_v2", &cuda.MemFree);
  loader.Find("cuGetErrorString", &cuda.GetErrorString);
  if (!cuda.usable()) return cuda;
  // No GPU, or none that is visible, is an error here as well.
  const CudaResult result = cuda.Init(0);
  if (result != kCudaSuccess) cuda.why_not = cuda.Text(result);
  return cuda;
}

Nccl LoadNccl(const char* file) {
  Nccl nccl;
  Loader loader(file, &nccl.path, &nccl.why_not);
  loader.Find("ncclGetVersion", &nccl.GetVersion);
  loader.Find("ncclGetUniqueId", &nccl.GetUniqueId);
  loader.Find("ncclCommInitRank", &nccl.CommInitRank);
  loader.Find("ncclCommDestroy", &nccl.CommDestroy);
  loader.Find("ncclCommAbort", &nccl.CommAbort);
  loader.Find("ncclCommGetAsyncError", &nccl.CommGetAsyncError);
  loader.Find("ncclSend", &nccl.Send);
  loader.Find("ncclRecv", &nccl.Recv);
  loader.Find("ncclAllReduce", &nccl.AllReduce);
  loader.Find("ncclGroupStart", &nccl.GroupStart);
  loader.Find("ncclGroupEnd", &nccl.GroupEnd);
  loader.Find("ncclGetErrorString", &nccl.GetErrorString);
  loader.Find("ncclGetLastError", &nccl.GetLastError);
  if (!nccl.usable()) return nccl;
  nccl.GetVersion(&nccl.version);
  if (nccl.version < kOldestNccl) {
    nccl.why_not = "it is too old: version=" + std::to_string(nccl.version) +
                   " oldest=" + std::to_string(kOldestNccl);
  }
  return nccl;
}

const Cuda& GetCuda() {
  static const auto* cuda = new Cuda(LoadCuda("libcuda.so.1"));
  return *cuda;
}

const Nccl& GetNccl() {
  static const auto* nccl = new Nccl(LoadNccl("libnccl.so.2"));
  return *nccl;
}

}  // namespace smp
