// A fake of CUDA's driver over the memory of the host, for tests only: libfake_cuda.so.
//
// What is waited for, and what is not, is as in CUDA: nothing but the functions that
// synchronize keeps the caller; an event counts from its latest record before the call
// that waits; cuMemFree waits for all that the device has been given. What CUDA would
// leave undefined, or would refuse, is counted as a mistake.
//
// FAKE_CUDA_DEVICES says how many GPUs there are; 1 if it is not set.
#include "fake_cuda.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "fake_driver.h"

namespace smp {
namespace {

constexpr size_t kDeviceBytes = size_t{16} << 30;

thread_local std::vector<CudaContext> contexts;

int CountDevices() {
  const char* const text = std::getenv("FAKE_CUDA_DEVICES");
  return std::min(text == nullptr ? 1 : std::atoi(text), FakeDriver::kMaxDevices);
}

}  // namespace

// Never destroyed: streams have threads that outlive main().
FakeDriver& Driver() {
  static auto* const driver = new FakeDriver;
  return *driver;
}

CudaContext CurrentContext() { return contexts.empty() ? nullptr : contexts.back(); }

CudaResult Mistake(CudaResult result, const char* what) {
  if (!FakeIsQuiet()) std::fprintf(stderr, "fake CUDA: %s (%d)\n", what, result);
  ++Driver().mistakes;
  return result;
}

}  // namespace smp

using namespace smp;

extern "C" {

void fake_cuda_counts(FakeCudaCounts* counts) {
  FakeDriver& driver = Driver();
  std::lock_guard<std::mutex> lock(driver.mutex);
  counts->contexts_pushed = driver.pushed;
  counts->streams = static_cast<int>(driver.streams.size());
  counts->events = static_cast<int>(driver.events.size());
  counts->allocations = static_cast<int>(driver.allocations.size());
  counts->mistakes = driver.mistakes;
}

// --- devices and contexts

CudaResult cuInit(unsigned) {
  if (CountDevices() == 0) return kNoDevice;
  Driver().initialized = true;
  return kCudaSuccess;
}

CudaResult cuDriverGetVersion(int* version) {
  *version = 12040;
  return kCudaSuccess;
}

CudaResult cuDeviceGetCount(int* count) {
  if (!Driver().initialized) return kNotInitialized;
  *count = CountDevices();
  return kCudaSuccess;
}

CudaResult cuDeviceGet(CudaDevice* device, int ordinal) {
  if (!Driver().initialized) return kNotInitialized;
  if (ordinal < 0 || ordinal >= CountDevices()) return kInvalidDevice;
  *device = ordinal;
  return kCudaSuccess;
}

CudaResult cuDeviceGetName(char* name, int length, CudaDevice) {
  std::snprintf(name, static_cast<size_t>(length), "Fake GPU");
  return kCudaSuccess;
}

CudaResult cuDeviceGetUuid_v2(CudaUuid* uuid, CudaDevice device) {
  std::memset(uuid->bytes, 0, sizeof uuid->bytes);
  uuid->bytes[15] = static_cast<char>(device + 1);
  return kCudaSuccess;
}

CudaResult cuDeviceGetPCIBusId(char* id, int length, CudaDevice device) {
  std::snprintf(id, static_cast<size_t>(length), "00000000:%02x:00.0", device + 1);
  return kCudaSuccess;
}

CudaResult cuDeviceTotalMem_v2(size_t* bytes, CudaDevice) {
  *bytes = kDeviceBytes;
  return kCudaSuccess;
}

CudaResult cuDevicePrimaryCtxRetain(CudaContext* context, CudaDevice device) {
  if (!Driver().initialized) return kNotInitialized;
  if (device < 0 || device >= CountDevices()) return kInvalidDevice;
  *context = &Driver().contexts[device];
  return kCudaSuccess;
}

CudaResult cuCtxPushCurrent_v2(CudaContext context) {
  if (context == nullptr) return Mistake(kInvalidContext, "cuCtxPushCurrent of null");
  contexts.push_back(context);
  ++Driver().pushed;
  return kCudaSuccess;
}

CudaResult cuCtxPopCurrent_v2(CudaContext* context) {
  if (CurrentContext() == nullptr)
    return Mistake(kInvalidContext, "cuCtxPopCurrent without a push");
  if (context != nullptr) *context = contexts.back();
  contexts.pop_back();
  --Driver().pushed;
  return kCudaSuccess;
}

CudaResult cuCtxGetCurrent(CudaContext* context) {
  *context = CurrentContext();
  return kCudaSuccess;
}

// --- memory

CudaResult cuMemAlloc_v2(CudaAddress* address, size_t bytes) {
  if (CurrentContext() == nullptr)
    return Mistake(kInvalidContext, "cuMemAlloc: no context");
  if (bytes == 0) return Mistake(kInvalidValue, "cuMemAlloc of no bytes");
  void* const memory = std::malloc(bytes);
  if (memory == nullptr) return kOutOfMemory;
  *address = reinterpret_cast<CudaAddress>(memory);
  std::lock_guard<std::mutex> lock(Driver().mutex);
  Driver().allocations[*address] = memory;
  return kCudaSuccess;
}

CudaResult cuMemFree_v2(CudaAddress address) {
  if (CurrentContext() == nullptr)
    return Mistake(kInvalidContext, "cuMemFree: no context");
  void* memory = nullptr;
  {
    std::lock_guard<std::mutex> lock(Driver().mutex);
    const auto found = Driver().allocations.find(address);
    if (found == Driver().allocations.end()) {
      return Mistake(kInvalidValue, "cuMemFree of what was not allocated");
    }
    memory = found->second;
    Driver().allocations.erase(found);
  }
  Synchronize();
  std::free(memory);
  return kCudaSuccess;
}

CudaResult cuMemcpyHtoD_v2(CudaAddress to, const void* from, size_t bytes) {
  std::memcpy(reinterpret_cast<void*>(to), from, bytes);
  return kCudaSuccess;
}

CudaResult cuMemcpyDtoH_v2(void* to, CudaAddress from, size_t bytes) {
  std::memcpy(to, reinterpret_cast<void*>(from), bytes);
  return kCudaSuccess;
}

CudaResult cuGetErrorString(CudaResult result, const char** text) {
  switch (result) {
    case kCudaSuccess:
      *text = "no error";
      break;
    case kInvalidValue:
      *text = "invalid argument";
      break;
    case kOutOfMemory:
      *text = "out of memory";
      break;
    case kNotInitialized:
      *text = "initialization error";
      break;
    case kNoDevice:
      *text = "no CUDA-capable device is detected";
      break;
    case kInvalidDevice:
      *text = "invalid device ordinal";
      break;
    case kInvalidContext:
      *text = "invalid device context";
      break;
    case kInvalidHandle:
      *text = "invalid resource handle";
      break;
    case kCudaNotReady:
      *text = "device not ready";
      break;
    default:
      *text = nullptr;
      return kInvalidValue;
  }
  return kCudaSuccess;
}

}  // extern "C"
