// The stream of computations of the fake GPU, see device.cc. For tests only.
#ifndef SMP_TF_TESTS_FAKE_DEVICE_STREAM_H_
#define SMP_TF_TESTS_FAKE_DEVICE_STREAM_H_

#include <cstdint>
#include <functional>

#include "kernels/gpu_abi.h"
#include "xla/stream_executor/host/host_stream.h"
#include "xla/stream_executor/stream.h"

namespace smp::testing {

// A stream of libfake_cuda.so. It stands for all streams that TensorFlow has on a GPU:
// those that copy wait for that of computations, and it for them.
class ComputeStream : public stream_executor::host::HostStream {
 public:
  ComputeStream();

  // What kernels ask for.
  PlatformSpecificHandle platform_specific_handle() const override {
    return {stream_};
  }

  // Runs `work` when all that the stream was given before is done.
  void Put(std::function<void()> work) const;

  // Waits for all that it was given.
  void Synchronize() const;

  // What TensorFlow asks of a stream, to copy within a device.
  absl::Status Memcpy(stream_executor::DeviceMemoryBase* to,
                      const stream_executor::DeviceMemoryBase& from,
                      uint64_t bytes) override;
  absl::Status RecordEvent(stream_executor::Event* event) override;
  absl::Status WaitFor(Stream* other) override;
  absl::Status BlockHostUntilDone() override;

 private:
  CudaStream stream_ = nullptr;
};

ComputeStream& Computations();

}  // namespace smp::testing

#endif  // SMP_TF_TESTS_FAKE_DEVICE_STREAM_H_
