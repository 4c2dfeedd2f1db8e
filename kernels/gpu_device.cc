#include "gpu_device.h"

#include <string>

namespace smp {

GpuDevice::~GpuDevice() {
  if (context_ == nullptr) return;
  const Current current(*this);
  for (CudaEvent event : free_) cuda_->EventDestroy(event);
  // The context is the process's, and is kept.
}

Status GpuDevice::Check(CudaResult result, const char* what) const {
  if (result == kCudaSuccess) return {};
  return {Code::kUnavailable, std::string(what) + ": " + cuda_->Text(result)};
}

Status GpuDevice::Open(int ordinal) {
  CudaDevice device;
  Status status = Check(cuda_->DeviceGet(&device, ordinal), "cuDeviceGet");
  if (!status.ok()) return status;
  return Check(cuda_->DevicePrimaryCtxRetain(&context_, device),
               "cuDevicePrimaryCtxRetain");
}

Status GpuDevice::MakeStream(CudaStream* stream) {
  const Current current(*this);
  return Check(cuda_->StreamCreate(stream, kCudaStreamNonBlocking), "cuStreamCreate");
}

void GpuDevice::FreeStream(CudaStream stream) {
  const Current current(*this);
  cuda_->StreamDestroy(stream);
}

Status GpuDevice::Record(CudaStream stream, GpuEvent* event) {
  const Current current(*this);
  CudaEvent free = nullptr;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!free_.empty()) {
      free = free_.back();
      free_.pop_back();
    }
  }
  if (free == nullptr) {
    const Status made =
        Check(cuda_->EventCreate(&free, kCudaEventDisableTiming), "cuEventCreate");
    if (!made.ok()) return made;
  }
  *event = GpuEvent(free, [self = shared_from_this()](CudaEvent used) {
    std::lock_guard<std::mutex> lock(self->mutex_);
    self->free_.push_back(used);
  });
  return Check(cuda_->EventRecord(free, stream), "cuEventRecord");
}

Status GpuDevice::Wait(CudaStream stream, const GpuEvent& event) {
  if (event == nullptr) return {};
  const Current current(*this);
  return Check(cuda_->StreamWaitEvent(stream, event.get(), 0), "cuStreamWaitEvent");
}

bool GpuDevice::IsOver(const GpuEvent& event, Status* status) {
  if (event == nullptr) return true;
  const Current current(*this);
  const CudaResult result = cuda_->EventQuery(event.get());
  if (result == kCudaNotReady) return false;
  *status = Check(result, "a stream of messages failed");
  return true;
}

}  // namespace smp
