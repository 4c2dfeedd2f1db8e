// What the files of the fake CUDA driver share. A stream is a thread with a queue, an
// event is a point in one. For tests only.
#ifndef SMP_TF_KERNELS_TESTS_FAKE_DRIVER_H_
#define SMP_TF_KERNELS_TESTS_FAKE_DRIVER_H_

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../gpu_abi.h"

namespace smp {

// A place in the work of a stream, which the stream comes to.
class FakePoint {
 public:
  void Reach() {
    std::lock_guard<std::mutex> lock(mutex_);
    reached_ = true;
    changed_.notify_all();
  }

  void Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return reached_; });
  }

  bool reached() {
    std::lock_guard<std::mutex> lock(mutex_);
    return reached_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool reached_ = false;
};

using FakePointPtr = std::shared_ptr<FakePoint>;

// Work is done in order, on a thread that ends once the stream is closed and empty.
class FakeWork : public std::enable_shared_from_this<FakeWork> {
 public:
  void Start() {
    std::thread([self = shared_from_this()] { self->Run(); }).detach();
  }

  void Put(std::function<void()> work) {
    std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back(std::move(work));
    changed_.notify_all();
  }

  // Returns at once; what was put is still done.
  void Close() {
    std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    changed_.notify_all();
  }

  FakePointPtr Mark() {
    auto point = std::make_shared<FakePoint>();
    std::lock_guard<std::mutex> lock(mutex_);
    if (over_) {
      point->Reach();
    } else {
      queue_.push_back([point] { point->Reach(); });
    }
    changed_.notify_all();
    return point;
  }

 private:
  void Run() {
    while (true) {
      std::function<void()> work;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return closed_ || !queue_.empty(); });
        over_ = queue_.empty();
        if (over_) return;
        work = std::move(queue_.front());
        queue_.pop_front();
      }
      work();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  bool closed_ = false;
  bool over_ = false;
};

struct CudaContextTag {
  int device;
};

struct CudaStreamTag {
  std::shared_ptr<FakeWork> work;
  CudaContext context;
};

struct CudaEventTag {
  std::mutex mutex;
  FakePointPtr latest;  // null: never recorded
};

constexpr CudaResult kInvalidValue = 1;
constexpr CudaResult kOutOfMemory = 2;
constexpr CudaResult kNotInitialized = 3;
constexpr CudaResult kNoDevice = 100;
constexpr CudaResult kInvalidDevice = 101;
constexpr CudaResult kInvalidContext = 201;
constexpr CudaResult kInvalidHandle = 400;

struct FakeDriver {
  static constexpr int kMaxDevices = 16;

  FakeDriver() {
    for (int i = 0; i < kMaxDevices; ++i) contexts[i].device = i;
  }

  CudaContextTag contexts[kMaxDevices];
  std::atomic<bool> initialized{false};
  std::atomic<int> pushed{0};
  std::atomic<int> mistakes{0};

  std::mutex mutex;
  std::set<CudaStream> streams;
  std::vector<std::weak_ptr<FakeWork>> works;  // of closed streams as well
  std::set<CudaEvent> events;
  std::unordered_map<CudaAddress, void*> allocations;
};

FakeDriver& Driver();

// Of the calling thread; null if there is none.
CudaContext CurrentContext();

// Counts it, says it on stderr, and gives back `result`.
CudaResult Mistake(CudaResult result, const char* what);

// Waits for everything that all streams have been given.
void Synchronize();

}  // namespace smp

#endif  // SMP_TF_KERNELS_TESTS_FAKE_DRIVER_H_
