#include "stream.h"

#include <cstring>
#include <memory>
#include <utility>

#include "absl/log/check.h"
#include "absl/synchronization/notification.h"
#include "kernels/gpu_device.h"
#include "kernels/tests/fake_cuda.h"
#include "xla/stream_executor/host/host_event.h"
#include "xla/stream_executor/platform_manager.h"

namespace smp::testing {
namespace {

namespace se = stream_executor;

// TensorFlow's executor for the memory of the host: it makes the events.
se::StreamExecutor* Host() {
  return se::PlatformManager::PlatformWithName("Host")
      .value()
      ->ExecutorForDevice(0)
      .value();
}

}  // namespace

ComputeStream::ComputeStream() : HostStream(Host()) {
  const auto device = std::make_shared<GpuDevice>(&GetCuda());
  CHECK(device->Open(0).ok() && device->MakeStream(&stream_).ok());
}

void ComputeStream::Put(std::function<void()> work) const {
  const auto call = [](void* argument) {
    const std::unique_ptr<std::function<void()>> work(
        static_cast<std::function<void()>*>(argument));
    (*work)();
  };
  cuLaunchHostFunc(stream_, call, new std::function<void()>(std::move(work)));
}

void ComputeStream::Synchronize() const { cuStreamSynchronize(stream_); }

absl::Status ComputeStream::Memcpy(se::DeviceMemoryBase* to,
                                   const se::DeviceMemoryBase& from, uint64_t bytes) {
  Synchronize();  // at once, as XLA reads it without asking the stream
  std::memcpy(to->opaque(), from.opaque(), bytes);
  return absl::OkStatus();
}

absl::Status ComputeStream::RecordEvent(se::Event* event) {
  auto reached = std::make_shared<absl::Notification>();
  static_cast<se::HostEvent*>(event)->notification() = reached;
  Put([reached] { reached->Notify(); });
  return absl::OkStatus();
}

absl::Status ComputeStream::WaitFor(Stream*) { return absl::OkStatus(); }  // itself

absl::Status ComputeStream::BlockHostUntilDone() {
  Synchronize();
  return absl::OkStatus();
}

ComputeStream& Computations() {
  static auto* const stream = new ComputeStream;  // its work outlives main()
  return *stream;
}

}  // namespace smp::testing
