// This process's part in the job: its peers, its one failure, its end.
#ifndef SMP_TF_KERNELS_JOB_H_
#define SMP_TF_KERNELS_JOB_H_

#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "control.h"
#include "mailbox.h"
#include "nccl_transport.h"
#include "ucx_transport.h"
#include "watch.h"

namespace smp {

// The life of a job: Open, Connect to each peer, Start, messages, Close.
//
// A job fails once. The first rank that is known to have failed is the culprit, and
// every wait on every peer, pending or future, fails with a text that names it. Who
// learns of a failure tells all others at once, so that a rank which dies of it later
// is not taken for the culprit.
class Job : public Listener {
 public:
  struct Options {
    int rank = 0;
    int size = 1;
    double timeout_seconds = 600;
    double stall_seconds = 30;
    double silence_seconds = 30;  // of another host, after which it is cut off
    std::string job_id;
    std::string net_devices;  // empty: all
  };

  explicit Job(Options options);
  ~Job() override;

  // Gives the address that the peers connect to.
  Status Open(std::string* address);
  Status Connect(int peer, const void* address);

  // Shakes hands with every peer; names those that do not answer in time.
  Status Start();

  // Lets this rank send and receive in the memory of its GPU, by NCCL; to be called
  // after Start, before the first message of that kind. See NcclTransport for Connect.
  Status OpenGpu(int ordinal);
  Status ConnectGpu(int peer, NcclTransport::Way way, const std::string& id);
  Status ConnectGroup(const std::vector<int>& ranks, const std::string& id, int* group);

  // Tells every peer that this rank gives up, and why; takes a second at most.
  void Abort(const std::string& reason);

  // Whether a rank has failed, and how.
  bool Failure(std::string* text);

  // Leaves: waits, at most `seconds`, until this rank's sends have arrived and every
  // live peer leaves as well. After a failure it waits for nobody.
  Status Close(double seconds);

  // The same in a hurry, for the end of the process: waits for nobody, frees nothing.
  void LeaveAtExit();

  std::string Describe(int peer) { return transport_.Describe(peer); }
  Mailbox& mailbox() { return mailbox_; }
  // For memory of the GPU; null before OpenGpu.
  struct Gpu {
    Gpu(const Options& options, std::shared_ptr<GpuDevice> device, const Nccl& nccl,
        NcclTransport::Failed failed, Watch* watch);
    NcclTransport transport;
    Mailbox mailbox;  // over the transport
  };
  Gpu* gpu() { return gpu_; }

  Transport& transport() { return transport_; }
  const Options& options() const { return options_; }

 private:
  struct Peer {
    bool connected = false;
    bool remote = false;   // on another host
    int hellos = 0;        // one on each endpoint
    bool leaving = false;  // said so, or is dead: nothing to wait for any more
    bool left = false;
    bool dead = false;
  };

  void OnControl(const std::string& bytes, ucp_ep_h reply) override;
  void OnPeerDown(int peer, const std::string& why) override;
  void OnTick() override;

  void Refuse(const Control& control, ucp_ep_h reply);
  void OnHello(int peer);
  void OnLeaving(int peer, bool last);
  void Fail(int culprit, const std::string& text);
  void Break(int peer, const Status& why, bool drain);
  Status FindGpu(Gpu** gpu);  // an error also when the job has failed
  void Say(Word word, UcxTransport::Lane lane, int culprit = -1,
           const std::string& text = "");
  void SayAlive(Watch::Clock::time_point now);
  bool WaitForPeers(double seconds, const std::function<bool(const Peer&)>& ready,
                    std::string* missing);
  void Log(const std::string& text) const;

  const Options options_;
  UcxTransport transport_;
  std::unique_ptr<Transport> link_;  // over the transport; may be null
  Watch watch_;
  Mailbox mailbox_;
  std::unique_ptr<Gpu> gpu_owner_;
  std::atomic<Gpu*> gpu_{nullptr};  // once it is whole, as other threads look at it

  Watch::Clock::time_point next_alive_;  // of the transport's thread

  // Never held while the transport is called.
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Peer> peers_;
  std::set<int> strangers_;  // refused; the ranks they say they are
  bool started_ = false;
  bool failed_ = false;
  std::string failure_;
  const pid_t owner_;
};

// The job of this process, or null. Kernels keep it alive while they use it.
std::shared_ptr<Job> CurrentJob();
void SetCurrentJob(std::shared_ptr<Job> job);

}  // namespace smp

#endif  // SMP_TF_KERNELS_JOB_H_
