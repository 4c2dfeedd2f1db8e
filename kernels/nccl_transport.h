// The transport for the memory of GPUs: NCCL's sends and receives, in order.
//
// NCCL matches by order, not by tag: the n-th message that one rank sends to another one
// meets the n-th that the other one receives from it. Whoever writes the programs of the
// ranks sees to that; tags only serve errors.
//
// Streams. A message waits for what is on the caller's stream when it is posted (it made
// the data, or still uses the memory), and nobody waits for the message but who says
// Join: a stream, not a thread. So a step runs ahead of the device, and what has failed
// is told where the step waits for all, at its end.
//
// Threads. Callers put messages on the stream themselves. One thread of the transport
// looks which are over, reports them, and lets go of their memory. What is on a stream
// cannot be taken back, only the whole communicator can be given up: when a peer has
// failed, and by Cancel, which so ends the direction, too. The end of one communicator
// may have to wait for that of others, hence a thread for each, which whoever hears of
// the failure starts: the transport's own thread may wait inside of CUDA for that end.
#ifndef SMP_TF_KERNELS_NCCL_TRANSPORT_H_
#define SMP_TF_KERNELS_NCCL_TRANSPORT_H_

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "gpu_device.h"
#include "nccl_group.h"
#include "nccl_lane.h"
#include "transport.h"

namespace smp {

class NcclTransport : public Transport {
 public:
  using Way = NcclLane::Way;

  // Called, on the transport's own thread, when NCCL itself has failed and nobody has
  // told of a peer's failure a second later. `why` names all whose it may be.
  using Failed = std::function<void(const std::string& why)>;

  NcclTransport(int size, std::shared_ptr<GpuDevice> device, const Nccl* nccl,
                Failed failed);
  ~NcclTransport() override;

  // What both ends of a lane need to Connect; one of them makes it.
  static Status MakeId(const Nccl& nccl, std::string* id);

  // Makes the lane to, or from, `peer`, which must call it as well. Ranks that connect
  // several lanes must do so in an order that all of them agree on.
  Status Connect(int peer, Way way, const std::string& id, double seconds);
  bool IsConnected(int peer, Way way);

  // The same for the sums of a group of ranks, in order, of which this one is one. Gives
  // the number that AllReduce knows the group by; there is no end to it but the job's.
  Status ConnectGroup(const std::vector<int>& ranks, int rank, const std::string& id,
                      double seconds, int* group);

  // The sum over a group into message.sum; its ranks must ask for their sums in the same
  // order. message.peer is the number of the group. Cancel and Holds know it, too.
  void AllReduce(Message message, Done done) override;

  // As in Transport. `done` of a send: its memory is free again; of a receive: the data
  // is there.
  void Send(Message message, Done done) override;
  void Recv(Message message, Done done) override;
  void Cancel(uint64_t id, const Status& why) override;
  void Break(int peer, const Status& why, bool drain) override;
  bool Holds(uint64_t id) override;
  void Close(double seconds) override;

  // A receive whose size is not known yet takes its place in the order now, without a
  // buffer; those posted after it wait until Fill gives it one.
  void Reserve(Message message, Done done) override;
  void Fill(uint64_t id, Buffer buffer);

  // Lets `stream` wait for a message, and begins what was held back of those up to it.
  // `told` is called once the stream knows, or the message is over, well or not.
  void Join(uint64_t id, void* stream, Done told);

  bool WaitForSends(double seconds);

  // For the end of the process: stops the thread, and frees nothing, as CUDA may be
  // gone already.
  void CloseAtExit();

 private:
  using Clock = std::chrono::steady_clock;

  struct Operation {
    Message message;
    Done done;            // empty once reported
    bool ready = true;    // has its buffer
    bool held = false;    // until somebody joins it, or one behind it
    bool issued = false;  // on the stream
    GpuEvent before, after;
    std::vector<std::pair<void*, Done>> joins;  // who came before it was issued
  };
  using OperationPtr = std::shared_ptr<Operation>;
  using Calls = std::vector<std::function<void()>>;

  // What this rank sends to, or receives from, one peer; or the sums of a group.
  struct Queue : std::enable_shared_from_this<Queue> {
    std::vector<int> peers;  // who must be alive
    bool sends = false;      // others wait for what is in it
    std::string name;        // "messages to rank 3", for errors
    std::mutex issuing;                // taken before mutex_; held while NCCL is called
    std::shared_ptr<NcclStream> stream;  // null: not connected
    std::deque<OperationPtr> waiting;  // in order
    std::deque<OperationPtr> running;  // in order: on the stream, or on the way to it
    bool left = false;                 // the peer has, with `why`: no more will come
    uint64_t asked = 0;                // then: the id that the device has come to
    Clock::time_point asked_at;
    Status error;                      // of NCCL: told at tell_at, if not explained
    Clock::time_point tell_at;
    bool broken = false;               // with `why`; the communicator ends at abort_at
    bool aborting = false;
    bool aborted = false;
    Clock::time_point abort_at;
    Status why;
  };

  Queue* QueueOf(int peer, Way way);
  Status ConnectQueue(Queue* queue, std::shared_ptr<NcclStream> stream,
                      const std::string& id, double seconds);
  void Submit(Queue* queue, Message message, bool ready, Done done);
  std::vector<std::shared_ptr<Queue>> Queues();
  void Pump(Queue* queue);
  std::vector<OperationPtr> NextLocked(Queue* queue);
  void ReleaseLocked(Queue* queue, const OperationPtr& last);
  void Launched(Queue* queue, const std::vector<OperationPtr>& batch,
                const GpuEvent& after, const Status& status, Calls* calls);
  void TellLocked(Operation* operation, const Status& status, Calls* calls);
  void BreakLocked(Queue* queue, const Status& why, double grace, Calls* calls);
  static void CallAll(Calls* calls);
  static void Abort(std::shared_ptr<Queue> queue, std::shared_ptr<NcclStream> stream);

  // The thread, in nccl_progress.cc.
  void Run();
  bool IsBusyLocked();
  bool Reap(Queue* queue);
  void EndIfLeft(Queue* queue);
  void TellIfDue(Queue* queue);
  void AbortIfDue(const std::shared_ptr<Queue>& queue);
  void LookForErrors();
  void GiveUpLocked(Queue* queue, const Status& error);
  bool WaitUntil(double seconds, const std::function<bool()>& ready);
  void Stop();

  const std::shared_ptr<GpuDevice> device_;
  const Nccl* const nccl_;
  const Failed failed_;

  // Never held while a callback, CUDA or NCCL is called.
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::shared_ptr<Queue>> queues_;  // [2 * peer + way], then the groups
  std::unordered_map<uint64_t, std::pair<Queue*, OperationPtr>> operations_;
  Clock::time_point next_look_;  // of the transport's thread
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace smp

#endif  // SMP_TF_KERNELS_NCCL_TRANSPORT_H_
