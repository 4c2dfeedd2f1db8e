// A link with a delay, for tests only: the kernels of users have kernels/link.cc in
// place of this. Every message leaves SMP_TEST_LINK_MS milliseconds after it was sent;
// those behind it do not wait for it any longer, and nor does its sender.
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>

#include "../transport.h"

namespace smp {
namespace {

using Clock = std::chrono::steady_clock;

class SlowLink : public Transport {
 public:
  SlowLink(Transport* inner, double milliseconds)
      : inner_(inner),
        delay_(std::chrono::duration_cast<Clock::duration>(
            std::chrono::duration<double, std::milli>(milliseconds))),
        thread_([this] { Run(); }) {}

  ~SlowLink() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  void Send(Message message, Done done) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      queue_.push_back({Clock::now() + delay_, std::move(message), std::move(done)});
    }
    changed_.notify_all();
  }

  void Recv(Message message, Done done) override {
    inner_->Recv(std::move(message), std::move(done));
  }

  void Cancel(uint64_t id, const Status& why) override {
    Done done;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (auto one = queue_.begin(); one != queue_.end(); ++one) {
        if (one->message.id != id) continue;
        done = std::move(one->done);
        queue_.erase(one);
        break;
      }
    }
    if (done) return done(why);
    inner_->Cancel(id, why);
  }

  // What has not left yet fails when its time comes.
  void Break(int peer, const Status& why, bool drain) override {
    inner_->Break(peer, why, drain);
  }

  bool Holds(uint64_t id) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (const auto& one : queue_) {
        if (one.message.id == id) return true;
      }
    }
    return inner_->Holds(id);
  }

  void Close(double seconds) override { inner_->Close(seconds); }

 private:
  struct Late {
    Clock::time_point time;
    Message message;
    Done done;
  };

  void Run() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      // All are as late, so that the first one is the next one.
      if (queue_.empty() && closing_) return;
      if (queue_.empty()) {
        changed_.wait(lock);
      } else if (!closing_ && Clock::now() < queue_.front().time) {
        changed_.wait_until(lock, queue_.front().time);
      } else {
        Late one = std::move(queue_.front());
        queue_.pop_front();
        lock.unlock();
        inner_->Send(std::move(one.message), std::move(one.done));
        lock.lock();
      }
    }
  }

  Transport* const inner_;
  const Clock::duration delay_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Late> queue_;
  bool closing_ = false;
  std::thread thread_;  // the last member: it uses all others
};

}  // namespace

std::unique_ptr<Transport> LinkOver(Transport* transport) {
  const char* milliseconds = std::getenv("SMP_TEST_LINK_MS");
  if (milliseconds == nullptr) return nullptr;
  return std::make_unique<SlowLink>(transport, std::atof(milliseconds));
}

}  // namespace smp
