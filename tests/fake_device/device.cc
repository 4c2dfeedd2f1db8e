// A GPU for TensorFlow that is not there, over the memory of the host: for tests only.
//
// TensorFlow places operations on it, copies to it and from it, and runs their kernels,
// as with a GPU. They compute by the kernels of kernels.cc; those of smp_tf are the real
// ones, over the fakes of CUDA and NCCL. What is freed is overwritten at once, so
// that a message that would still need it is found.
//
// To be loaded before TensorFlow is first used, after libfake_cuda.so.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <typeinfo>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "stream.h"
#include "tensorflow/core/common_runtime/device/device_event_mgr.h"
#include "tensorflow/core/common_runtime/gpu_device_context.h"
#include "tensorflow/core/common_runtime/local_device.h"
#include "tensorflow/core/framework/allocator.h"
#include "tensorflow/core/framework/device_factory.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/platform/env.h"
#include "tensorflow/core/public/session_options.h"

namespace smp::testing {
namespace {

using namespace tensorflow;

constexpr int kAboveCuda = 1000;  // the priority of TensorFlow's own factory is lower

class DeviceMemory : public Allocator {
 public:
  std::string Name() override { return "GPU_0_bfc"; }

  AllocatorMemoryType GetMemoryType() const override {
    return AllocatorMemoryType::kDevice;
  }

  void* AllocateRaw(size_t alignment, size_t bytes) override {
    void* const begin = cpu_allocator()->AllocateRaw(
        std::max(alignment, alignof(std::max_align_t)), kAhead + bytes);
    if (begin == nullptr) return nullptr;
    std::memcpy(begin, &bytes, sizeof bytes);
    return static_cast<char*>(begin) + kAhead;
  }

  void DeallocateRaw(void* data) override {
    if (data == nullptr) return;
    void* const begin = static_cast<char*>(data) - kAhead;
    size_t bytes;
    std::memcpy(&bytes, begin, sizeof bytes);
    std::memset(data, kFreed, bytes);
    cpu_allocator()->DeallocateRaw(begin);
  }

 private:
  static constexpr int kFreed = 0xff;  // a NaN of every type that has them
  static constexpr size_t kAhead = kAllocatorAlignment;  // for the size
};

class Context : public GPUDeviceContext {
 public:
  Context()
      : GPUDeviceContext(/*stream_id=*/0, &Computations(), &Computations(),
                         &Computations(), {&Computations()}, cpu_allocator()) {}

  void CopyCPUTensorToDevice(const Tensor* from, Device*, Tensor* to,
                             StatusCallback done, bool) const override {
    Copy(*from, *to, std::move(done));
  }

  void CopyDeviceTensorToCPU(const Tensor* from, absl::string_view, Device*, Tensor* to,
                             StatusCallback done) override {
    Copy(*from, *to, std::move(done));
  }

  void CopyTensorInSameDevice(const Tensor* from, Device*, Tensor* to,
                              StatusCallback done) const override {
    Copy(*from, *to, std::move(done));
  }

  absl::Status ThenExecute(Device*, stream_executor::Stream*,
                           std::function<void()> call) override {
    Computations().Put(std::move(call));
    return absl::OkStatus();
  }

 private:
  static void Copy(const Tensor& from, const Tensor& to, StatusCallback done) {
    Computations().Put([from, to, done = std::move(done)] {
      std::memcpy(const_cast<char*>(to.tensor_data().data()), from.tensor_data().data(),
                  from.TotalBytes());
      // Not here: who is told may wait for the stream.
      Env::Default()->SchedClosure([done] { done(absl::OkStatus()); });
    });
  }
};

class FakeGpu : public LocalDevice {
 public:
  FakeGpu(const SessionOptions& options, const std::string& name)
      : LocalDevice(options, BuildDeviceAttributes(
                                 name, DEVICE_GPU, Bytes(int64_t{16} << 30), {},
                                 "device: 0, name: Fake GPU")),
        context_(new Context) {
    info_.stream = &Computations();
    info_.default_context = context_;
    info_.event_mgr = EventMgrFactory::Singleton()->GetEventMgr(
        Computations().parent(), options.config.gpu_options());
    info_.gpu_id = 0;
    set_tensorflow_accelerator_device_info(&info_);
  }

  ~FakeGpu() override { context_->Unref(); }

  Allocator* GetAllocator(AllocatorAttributes attributes) override {
    static auto* const memory = new DeviceMemory;
    return attributes.on_host() ? cpu_allocator() : memory;
  }

  // A function that XLA compiles has no kernel of kernels.cc, and is called by one that
  // stands in for that of an ordinary call.
  void ComputeAsync(AsyncOpKernel* kernel, OpKernelContext* context,
                    AsyncOpKernel::DoneCallback done) override {
    if (absl::StrContains(typeid(*kernel).name(), "Xla")) Computations().Synchronize();
    kernel->ComputeAsync(context, std::move(done));
  }

  absl::Status MakeTensorFromProto(const TensorProto& proto,
                                   const AllocatorAttributes attributes,
                                   Tensor* tensor) override {
    if (tensor->FromProto(GetAllocator(attributes), proto)) return absl::OkStatus();
    return absl::InvalidArgumentError("no tensor: " + proto.DebugString());
  }

  void CopyTensorInSameDevice(const Tensor* from, Tensor* to,
                              const DeviceContext* context,
                              StatusCallback done) override {
    context->CopyTensorInSameDevice(from, this, to, std::move(done));
  }

  absl::Status TryGetDeviceContext(DeviceContext** context) override {
    context_->Ref();
    *context = context_;
    return absl::OkStatus();
  }

  absl::Status Sync() override { return Computations().BlockHostUntilDone(); }

 private:
  Context* const context_;
  AcceleratorDeviceInfo info_;
};

class Factory : public DeviceFactory {
 public:
  absl::Status ListPhysicalDevices(std::vector<std::string>* devices) override {
    devices->push_back("/physical_device:GPU:0");
    return absl::OkStatus();
  }

  absl::Status GetDeviceDetails(
      int, std::unordered_map<std::string, std::string>* details) override {
    (*details)["device_name"] = "Fake GPU";
    return absl::OkStatus();
  }

  absl::Status CreateDevices(const SessionOptions& options, const std::string& prefix,
                             std::vector<std::unique_ptr<Device>>* devices) override {
    const auto& counts = options.config.device_count();
    const auto count = counts.find(DEVICE_GPU);
    if (count == counts.end() || count->second > 0) {
      devices->push_back(std::make_unique<FakeGpu>(options, prefix + "/device:GPU:0"));
    }
    return absl::OkStatus();
  }
};

const bool registered = [] {
  DeviceFactory::Register(DEVICE_GPU, std::make_unique<Factory>(), kAboveCuda,
                          /*is_pluggable_device=*/false);
  return true;
}();

}  // namespace
}  // namespace smp::testing
