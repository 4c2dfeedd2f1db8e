// Streams and events of the fake CUDA driver, see fake_cuda.cc. For tests only.
#include <algorithm>
#include <cstring>

#include "fake_cuda.h"
#include "fake_driver.h"

namespace smp {
namespace {

bool IsAlive(CudaStream stream) {
  std::lock_guard<std::mutex> lock(Driver().mutex);
  return Driver().streams.count(stream) > 0;
}

bool IsAlive(CudaEvent event) {
  std::lock_guard<std::mutex> lock(Driver().mutex);
  return Driver().events.count(event) > 0;
}

}  // namespace

void Synchronize() {
  std::vector<FakePointPtr> points;
  {
    std::lock_guard<std::mutex> lock(Driver().mutex);
    auto& works = Driver().works;
    works.erase(std::remove_if(works.begin(), works.end(),
                               [](const auto& each) { return each.expired(); }),
                works.end());
    for (const auto& each : works) {
      if (const auto work = each.lock()) points.push_back(work->Mark());
    }
  }
  for (const auto& point : points) point->Wait();
}

}  // namespace smp

using namespace smp;

extern "C" {

CudaResult cuCtxSynchronize() {
  if (CurrentContext() == nullptr) {
    return Mistake(kInvalidContext, "cuCtxSynchronize: no context");
  }
  Synchronize();
  return kCudaSuccess;
}

// --- streams

CudaResult cuStreamCreate(CudaStream* stream, unsigned) {
  if (CurrentContext() == nullptr)
    return Mistake(kInvalidContext, "cuStreamCreate: no context");
  auto work = std::make_shared<FakeWork>();
  work->Start();
  *stream = new CudaStreamTag{work, CurrentContext()};
  std::lock_guard<std::mutex> lock(Driver().mutex);
  Driver().streams.insert(*stream);
  Driver().works.push_back(work);
  return kCudaSuccess;
}

CudaResult cuStreamDestroy_v2(CudaStream stream) {
  {
    std::lock_guard<std::mutex> lock(Driver().mutex);
    if (Driver().streams.erase(stream) == 0) {
      return Mistake(kInvalidHandle, "cuStreamDestroy of no stream");
    }
  }
  stream->work->Close();
  delete stream;
  return kCudaSuccess;
}

CudaResult cuStreamSynchronize(CudaStream stream) {
  if (!IsAlive(stream)) return Mistake(kInvalidHandle, "cuStreamSynchronize");
  stream->work->Mark()->Wait();
  return kCudaSuccess;
}

CudaResult cuStreamWaitEvent(CudaStream stream, CudaEvent event, unsigned) {
  if (!IsAlive(stream) || !IsAlive(event)) {
    return Mistake(kInvalidHandle, "cuStreamWaitEvent of no stream, or for no event");
  }
  FakePointPtr point;
  {
    std::lock_guard<std::mutex> lock(event->mutex);
    point = event->latest;
  }
  if (point != nullptr) stream->work->Put([point] { point->Wait(); });
  return kCudaSuccess;
}

CudaResult cuLaunchHostFunc(CudaStream stream, CudaHostFunction call, void* argument) {
  if (!IsAlive(stream)) return Mistake(kInvalidHandle, "cuLaunchHostFunc");
  stream->work->Put([call, argument] { call(argument); });
  return kCudaSuccess;
}

// --- events

CudaResult cuEventCreate(CudaEvent* event, unsigned) {
  if (CurrentContext() == nullptr)
    return Mistake(kInvalidContext, "cuEventCreate: no context");
  *event = new CudaEventTag;
  std::lock_guard<std::mutex> lock(Driver().mutex);
  Driver().events.insert(*event);
  return kCudaSuccess;
}

CudaResult cuEventDestroy_v2(CudaEvent event) {
  {
    std::lock_guard<std::mutex> lock(Driver().mutex);
    if (Driver().events.erase(event) == 0) {
      return Mistake(kInvalidHandle, "cuEventDestroy of no event");
    }
  }
  delete event;
  return kCudaSuccess;
}

CudaResult cuEventRecord(CudaEvent event, CudaStream stream) {
  if (!IsAlive(stream) || !IsAlive(event)) {
    return Mistake(kInvalidHandle, "cuEventRecord of no event, or on no stream");
  }
  std::lock_guard<std::mutex> lock(event->mutex);
  event->latest = stream->work->Mark();
  return kCudaSuccess;
}

CudaResult cuEventQuery(CudaEvent event) {
  if (!IsAlive(event)) return Mistake(kInvalidHandle, "cuEventQuery of no event");
  std::lock_guard<std::mutex> lock(event->mutex);
  const bool over = event->latest == nullptr || event->latest->reached();
  return over ? kCudaSuccess : kCudaNotReady;
}

CudaResult cuMemcpyDtoDAsync_v2(CudaAddress to, CudaAddress from, size_t bytes,
                                CudaStream stream) {
  if (!IsAlive(stream)) return Mistake(kInvalidHandle, "cuMemcpyDtoDAsync");
  stream->work->Put([=] {
    std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
  });
  return kCudaSuccess;
}

CudaResult cuMemsetD8Async(CudaAddress to, unsigned char value, size_t count,
                           CudaStream stream) {
  if (!IsAlive(stream)) return Mistake(kInvalidHandle, "cuMemsetD8Async");
  stream->work->Put([=] { std::memset(reinterpret_cast<void*>(to), value, count); });
  return kCudaSuccess;
}

}  // extern "C"
