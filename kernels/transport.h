// What a transport does: moves bytes between ranks, matched by tag.
//
// No TensorFlow type and no UCX type appears here. UcxTransport moves host memory,
// NcclTransport that of GPUs.
#ifndef SMP_TF_KERNELS_TRANSPORT_H_
#define SMP_TF_KERNELS_TRANSPORT_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

namespace smp {

enum class Code {
  kOk,
  kUnavailable,  // the peer, or the job, has failed or left
  kCancelled,
  kDeadline,
  kDataLoss,      // the two ends disagree about what the message is
  kInvalid,       // a caller's mistake
  kNotConnected,  // used before open or after close
};

struct Status {
  Code code = Code::kOk;
  std::string text;

  bool ok() const { return code == Code::kOk; }
};

using Done = std::function<void(const Status&)>;

// Bytes and what keeps them alive. A transport holds `owner` until it will not touch
// `data` any more, which may be long after the operation was reported as failed.
struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  std::shared_ptr<void> owner;
};

// What of a tensor a message carries. A tensor whose shape both ends know is one
// payload; any other one is a header, then a payload.
enum class Part : uint64_t { kPayload = 1, kHeader = 2 };

// 64 bits that both ends compute alike: part (4), source rank (12), channel (28),
// sequence number (20, wraps). A channel never has a million messages under way.
constexpr int kMaxRanks = 1 << 12;
constexpr uint32_t kMaxChannel = (1u << 28) - 1;

inline uint64_t MakeTag(Part part, int source, uint32_t channel, uint32_t sequence) {
  return static_cast<uint64_t>(part) << 60 | static_cast<uint64_t>(source) << 48 |
         static_cast<uint64_t>(channel) << 20 | (sequence & 0xfffff);
}

// Never 0, never given twice in a process.
uint64_t NextId();

// Of an allreduce of device memory: where the sum goes, which the owner of the buffer
// keeps alive as well, and the type of the elements as NCCL numbers them.
struct Sum {
  void* result = nullptr;
  int type = -1;
};

struct Message {
  uint64_t id = 0;  // from NextId()
  int peer = -1;
  uint64_t tag = 0;
  Buffer buffer;
  bool synchronous = false;  // a send that is complete once its receive was made

  // Of device memory only. `stream`: what fills the buffer of a send, and may still use
  // that of a receive, is on it already. `more`: another message to, or from, the same
  // peer follows at once, and they may travel together. `hold`: a receive does not
  // begin before somebody waits for it, or for one behind it.
  void* stream = nullptr;
  bool more = false;
  bool hold = false;
  Sum sum;
};

// Every call may come from any thread. `done` is called exactly once, either before
// Send or Recv returns or later on the transport's own thread, and never under a lock
// of the transport. No call waits for a peer, apart from Close.
class Transport {
 public:
  virtual ~Transport() = default;

  // Never waits for the receive.
  virtual void Send(Message message, Done done) = 0;

  // A message of another size than the buffer's ends in kDataLoss, with both sizes.
  virtual void Recv(Message message, Done done) = 0;

  // Of device memory only: the place of a receive whose size is not known yet.
  virtual void Reserve(Message, Done done) {
    done({Code::kInvalid, "host memory is received into a buffer that is there"});
  }

  // The same: a sum over the ranks of the group number `message.peer`.
  virtual void AllReduce(Message, Done done) {
    done({Code::kInvalid, "host memory is added up by those who have it"});
  }

  // Ends the operation with `why`, unless it is already over.
  virtual void Cancel(uint64_t id, const Status& why) = 0;

  // Ends every operation with `peer`, now and from now on, with `why`. With `drain`,
  // messages that have arrived already may still be received.
  virtual void Break(int peer, const Status& why, bool drain) = 0;

  // Whether the transport may still touch the buffer of operation `id`.
  virtual bool Holds(uint64_t id) = 0;

  // Gives up everything; waits at most `seconds` for messages on their way out.
  virtual void Close(double seconds) = 0;
};

// What a job's messages go through on their way to `transport`, or null for nothing.
// The tests link one that is late, kernels/tests/slow_link.cc, in place of link.cc.
std::unique_ptr<Transport> LinkOver(Transport* transport);

}  // namespace smp

#endif  // SMP_TF_KERNELS_TRANSPORT_H_
