// The GPU of this process: its context, and events between streams.
#ifndef SMP_TF_KERNELS_GPU_DEVICE_H_
#define SMP_TF_KERNELS_GPU_DEVICE_H_

#include <memory>
#include <mutex>
#include <vector>

#include "gpu_libraries.h"
#include "transport.h"

namespace smp {

// A point in the work of a stream. What refers to none is nothing to wait for.
using GpuEvent = std::shared_ptr<CudaEventTag>;

class GpuDevice : public std::enable_shared_from_this<GpuDevice> {
 public:
  // `cuda` must outlive it, and be usable.
  explicit GpuDevice(const Cuda* cuda) : cuda_(cuda) {}
  ~GpuDevice();

  // `ordinal` counts the visible ones. TensorFlow works in the same context.
  Status Open(int ordinal);

  Status MakeStream(CudaStream* stream);
  void FreeStream(CudaStream stream);

  // The event goes back to where it came from when the last reference is gone.
  Status Record(CudaStream stream, GpuEvent* event);

  // Lets the stream wait, not the caller.
  Status Wait(CudaStream stream, const GpuEvent& event);

  // Whether the stream has come as far, or will not any more: then with an error.
  bool IsOver(const GpuEvent& event, Status* status);

  Status Check(CudaResult result, const char* what) const;
  const Cuda& cuda() const { return *cuda_; }

  // While one lives, the device's context is that of the calling thread.
  class Current {
   public:
    explicit Current(const GpuDevice& device) : device_(device) {
      device_.cuda_->CtxPushCurrent(device_.context_);
    }
    ~Current() {
      CudaContext context;
      device_.cuda_->CtxPopCurrent(&context);
    }
    Current(const Current&) = delete;

   private:
    const GpuDevice& device_;
  };

 private:
  const Cuda* const cuda_;
  CudaContext context_ = nullptr;
  std::mutex mutex_;
  std::vector<CudaEvent> free_;
};

}  // namespace smp

#endif  // SMP_TF_KERNELS_GPU_DEVICE_H_
