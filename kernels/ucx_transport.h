// The transport for host memory: UCX tag messages, driven by events.
//
// Threads. A UCX worker serves one thread at a time, so every call into UCX is made
// under `worker_mutex_`, and so is the book-keeping of what UCX calls back: a request
// is looked up, cancelled and forgotten under one lock, and cannot vanish in between.
// Callers post straight from their own thread; one thread of the transport makes
// progress, sleeps in poll() while nothing happens, and calls `done` and the listener
// without the lock.
//
// Endpoints. UCX reports a peer's death only on endpoints that do without shared
// memory. So each peer has two: `data`, over shared memory where there is any, and
// `monitor`, over the network, which carries control words and notices the death. Of a
// host that is cut off or without power there is only silence, which nothing but words
// to it can bring to light; the listener sends them.
#ifndef SMP_TF_KERNELS_UCX_TRANSPORT_H_
#define SMP_TF_KERNELS_UCX_TRANSPORT_H_

#include <ucp/api/ucp.h>

#include <atomic>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "transport.h"

namespace smp {

// Called on the transport's own thread, in the order in which things happened.
class Listener {
 public:
  virtual ~Listener() = default;
  virtual void OnControl(const std::string& bytes, ucp_ep_h reply) = 0;
  virtual void OnPeerDown(int peer, const std::string& why) = 0;
  virtual void OnTick() = 0;  // ten times a second, more or less
};

class UcxTransport : public Transport {
 public:
  enum class Lane { kData, kMonitor };

  UcxTransport(int size, Listener* listener);
  ~UcxTransport() override;

  Status Open(const std::string& net_devices, double silence_seconds,
              std::string* address);
  Status Connect(int peer, const void* address);
  void Start();

  void Send(Message message, Done done) override;
  void Recv(Message message, Done done) override;
  void Cancel(uint64_t id, const Status& why) override;
  void Break(int peer, const Status& why, bool drain) override;
  bool Holds(uint64_t id) override;
  void Close(double seconds) override;
  // Closes without a word to those who wait: they belong to a process that is ending.
  // UCX must be closed all the same, as its own thread runs on into its destructors.
  void CloseAtExit();

  // Sends one control message; errors are not reported, a dead peer has no use for it.
  void SendControl(int peer, Lane lane, const std::string& bytes);
  void Reply(ucp_ep_h reply, const std::string& bytes);

  // Whether, within `seconds`, all control words have left this process, and all sends
  // are complete.
  bool FlushControl(double seconds);
  bool WaitForSends(double seconds);

  std::string Describe(int peer);
  bool SharesMemory(int peer);  // with this process: it is on the same host
  bool OnOwnThread() const { return std::this_thread::get_id() == thread_.get_id(); }

 private:
  enum class What { kSend, kRecv, kControl };

  struct Request {
    UcxTransport* transport;
    What what;
    Message message;
    Done done;  // empty once reported
    void* ucx = nullptr;
  };

  struct Peer {
    ucp_ep_h data = nullptr;
    ucp_ep_h monitor = nullptr;
    bool down = false;  // the monitor has failed
    bool broken = false;
    bool drain = false;
    Status why;
    UcxTransport* transport = nullptr;  // for the error callback, which gets a Peer
    int rank = -1;
  };

  static constexpr unsigned kControlId = 1;  // of the active message

  // Holds the worker; wakes the progress thread on release where that has work to do.
  class Hold {
   public:
    explicit Hold(UcxTransport* transport) : transport_(transport) {
      transport_->callers_++;
      transport_->worker_mutex_.lock();
      transport_->callers_--;
    }
    ~Hold() {
      const bool wake = transport_->asleep_ && (wake_ || !transport_->events_.empty());
      // Within the lock: Close destroys the worker.
      if (wake) {
        transport_->asleep_ = false;
        ucp_worker_signal(transport_->worker_);
      }
      transport_->worker_mutex_.unlock();
    }
    void WakeProgress() { wake_ = true; }

   private:
    UcxTransport* const transport_;
    bool wake_ = false;
  };

  ucp_ep_h MakeEndpoint(Peer* peer, const void* address, bool handle_errors,
                        ucs_status_t* status);
  void PostControl(ucp_ep_h endpoint, const std::string& bytes, uint32_t flags);
  void Submit(What what, Message message, Done done);
  ucs_status_ptr_t PostLocked(Request* request, ucp_tag_recv_info_t* info);
  bool HasArrivedLocked(const Message& message, size_t* bytes);
  void GiveUpLocked(Request* request, const Status& why);
  void CompleteLocked(Request* request, ucs_status_t status, size_t bytes);
  static Status Verdict(const Request& request, ucs_status_t status, size_t bytes);
  bool WaitUntil(double seconds, const std::function<bool()>& ready);
  void CloseEndpoint(ucp_ep_h endpoint, bool force, double seconds);
  void Stop();  // joins the progress thread; frees nothing
  std::vector<std::function<void()>> Destroy(double seconds);  // what is left to report
  void Run();

  static void OnSent(void* ucx, ucs_status_t status, void* user);
  static void OnReceived(void* ucx, ucs_status_t status,
                         const ucp_tag_recv_info_t* info, void* user);
  static void OnFlushed(void* ucx, ucs_status_t status, void* user);
  static void OnError(void* user, ucp_ep_h endpoint, ucs_status_t status);
  static ucs_status_t OnMessage(void* user, const void* header, size_t header_bytes,
                                void* data, size_t bytes,
                                const ucp_am_recv_param_t* param);

  Listener* const listener_;
  std::vector<Peer> peers_;

  std::mutex worker_mutex_;
  std::atomic<int> callers_{0};  // who wait for worker_mutex_; they go first
  // All below under worker_mutex_.
  ucp_context_h context_ = nullptr;
  ucp_worker_h worker_ = nullptr;
  int event_fd_ = -1;
  std::unordered_map<uint64_t, std::unique_ptr<Request>> requests_;
  std::vector<std::function<void()>> events_;  // to be called by the progress thread
  int flushing_ = 0;
  bool asleep_ = false;
  bool stop_ = false;

  std::thread thread_;
};

}  // namespace smp

#endif  // SMP_TF_KERNELS_UCX_TRANSPORT_H_
