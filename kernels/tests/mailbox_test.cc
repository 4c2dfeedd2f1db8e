// What needs no other process: numbers, flushes, deadlines, control words.
#include <deque>

#include "testing.h"

namespace smp {
namespace {

// Keeps what it is asked for, until the test says how it ends.
class FakeTransport : public Transport {
 public:
  struct Operation {
    Message message;
    Done done;
  };

  void Send(Message message, Done done) override {
    sends.push_back({std::move(message), std::move(done)});
  }
  void Recv(Message message, Done done) override {
    recvs.push_back({std::move(message), std::move(done)});
  }
  void Cancel(uint64_t id, const Status& why) override {
    for (auto& operation : recvs) {
      if (operation.message.id == id) operation.done(why);
    }
  }
  void Break(int, const Status&, bool) override {}
  bool Holds(uint64_t) override { return false; }
  void Close(double) override {}

  std::deque<Operation> sends, recvs;
};

struct Fixture {
  FakeTransport transport;
  std::vector<std::string> warnings;
  Watch watch{10, 3,
              [this](const TicketPtr& ticket, const Status& why) {
                mailbox.Cancel(ticket, why);
              },
              [this](const std::string& text) { warnings.push_back(text); }};
  Mailbox mailbox{0, 3, &transport, &watch};

  TicketPtr Recv(int peer, uint32_t channel) {
    return mailbox.Recv(To(peer, channel), Part::kPayload, {});
  }
  static RoutePtr To(int peer, uint32_t channel) {
    return std::make_shared<Route>(Route{peer, channel, "h"});
  }
};

void TestTagsTellEverythingApart() {
  CHECK_EQ(MakeTag(Part::kPayload, 1, 7, 3), 0x1001000000700003u);
  CHECK(MakeTag(Part::kPayload, 1, 7, 3) != MakeTag(Part::kHeader, 1, 7, 3));
  CHECK_EQ(MakeTag(Part::kHeader, kMaxRanks - 1, kMaxChannel, 0xfffff),
           0x2fffffffffffffffu);
  CHECK_EQ(MakeTag(Part::kPayload, 0, 0, 1 << 20), MakeTag(Part::kPayload, 0, 0, 0));
}

void TestNumbersCountPerDirectionPeerAndChannel() {
  Fixture f;
  for (const auto& [peer, channel] :
       std::vector<std::pair<int, uint32_t>>{{1, 7}, {1, 7}, {2, 7}, {1, 8}}) {
    f.mailbox.PostSend(f.To(peer, channel), nullptr, {});
  }
  f.Recv(1, 7);
  CHECK_EQ(f.transport.sends[0].message.tag, MakeTag(Part::kPayload, 0, 7, 0));
  CHECK_EQ(f.transport.sends[1].message.tag, MakeTag(Part::kPayload, 0, 7, 1));
  CHECK_EQ(f.transport.sends[2].message.tag, MakeTag(Part::kPayload, 0, 7, 0));
  CHECK_EQ(f.transport.sends[3].message.tag, MakeTag(Part::kPayload, 0, 8, 0));
  CHECK_EQ(f.transport.recvs[0].message.tag, MakeTag(Part::kPayload, 1, 7, 0));
}

void TestHeaderAndPayloadShareANumber() {
  Fixture f;
  const Buffer header;
  f.mailbox.PostSend(f.To(1, 7), nullptr, {});
  f.mailbox.PostSend(f.To(1, 7), &header, {});
  CHECK_EQ(f.transport.sends[1].message.tag, MakeTag(Part::kHeader, 0, 7, 1));
  CHECK_EQ(f.transport.sends[2].message.tag, MakeTag(Part::kPayload, 0, 7, 1));
  const TicketPtr first = f.mailbox.Recv(f.To(2, 7), Part::kHeader, {});
  f.mailbox.RecvPayload(first, {});
  CHECK_EQ(f.transport.recvs[1].message.tag, MakeTag(Part::kPayload, 2, 7, 0));
}

void TestFlushAnswersForTheSendsBeforeIt() {
  Fixture f;
  CHECK(f.mailbox.Flush()->finished());
  for (uint32_t i = 0; i < 3; ++i) f.mailbox.PostSend(f.To(1, i), nullptr, {});
  const TicketPtr flush = f.mailbox.Flush();
  f.mailbox.PostSend(f.To(1, 3), nullptr, {});
  f.transport.sends[2].done({});
  f.transport.sends[1].done({Code::kUnavailable, "rank 1 died"});
  CHECK(!flush->finished());
  f.transport.sends[0].done({});
  CHECK(flush->finished());
  CHECK_EQ(flush->status().text, "rank 1 died: send of h to rank 1, channel 1, step 0");
  const TicketPtr next = f.mailbox.Flush();
  f.transport.sends[3].done({});
  CHECK(next->finished() && next->status().ok());  // an error is told once
}

void TestASendTellsWhenItHasLeftBeforeItsFlushDoes() {
  Fixture f;
  std::string told;
  const auto say = [&](const Status& status) { told += status.ok() ? "s" : "e"; };
  f.mailbox.PostSend(f.To(1, 7), nullptr, {}, say);
  f.mailbox.Flush()->OnFinish([&](const Status&) { told += "f"; });
  CHECK_EQ(told, "");
  f.transport.sends[0].done({});
  CHECK_EQ(told, "sf");
  f.mailbox.PostSend(f.To(0, 7), nullptr, {}, say);  // to itself: fails at once
  CHECK_EQ(told, "sfe");
}

void TestPostedReceivesAreTakenInOrder() {
  Fixture f;
  CHECK(f.mailbox.PostRecv(f.To(1, 7), Part::kPayload, {}, 1).ok());
  CHECK(f.mailbox.PostRecv(f.To(1, 7), Part::kPayload, {}, 1).ok());
  CHECK_EQ(f.mailbox.Take(f.To(1, 7)).ticket->sequence(), 0u);
  CHECK(!f.mailbox.Take(f.To(2, 7)).ticket);
  // Another run finds what this one has left behind.
  const Status stale = f.mailbox.PostRecv(f.To(1, 7), Part::kPayload, {}, 2);
  CHECK(stale.code == Code::kUnavailable);
  CHECK(stale.text.find("an earlier step was given up") == 0);
  CHECK_EQ(f.mailbox.Take(f.To(1, 7)).ticket->sequence(), 1u);
  CHECK(!f.mailbox.Take(f.To(1, 7)).ticket);
}

void TestMistakesAreNamed() {
  Fixture f;
  CHECK_EQ(f.Recv(0, 1)->status().text,
           "peer must be another rank of the job; peer=0 rank=0 size=3: receive of h "
           "from rank 0, channel 1, step 0");
  CHECK(f.Recv(3, 1)->status().code == Code::kInvalid);
  CHECK(f.Recv(1, kMaxChannel + 1)->status().code == Code::kInvalid);
  CHECK(f.transport.recvs.empty());
}

void TestWatchWarnsOnceThenFails() {
  Fixture f;
  const TicketPtr ticket = f.Recv(2, 7);
  const auto start = Watch::Clock::now();
  f.watch.Tick(start + std::chrono::seconds(100));
  CHECK(!ticket->finished());  // posted, but nobody waits
  Status end;
  f.mailbox.Wait(ticket, [&](const Status& status) { end = status; });
  f.watch.Tick(start + std::chrono::seconds(2));
  CHECK(f.warnings.empty());
  f.watch.Tick(start + std::chrono::seconds(4));
  f.watch.Tick(start + std::chrono::seconds(5));
  CHECK_EQ(f.warnings.size(), 1u);
  CHECK(f.warnings[0].find("from rank 2, channel 7, step 0") != std::string::npos);
  CHECK(!ticket->finished());
  f.watch.Tick(start + std::chrono::seconds(11));
  CHECK(end.code == Code::kDeadline);
  CHECK(end.text.find("timeout_s=10 s") != std::string::npos);
}

void TestControlWordsSurviveTheWire() {
  Control control;
  control.word = Word::kFailed;
  control.source = 1;
  control.culprit = 3;
  control.job_id = std::string(kMaxJobId, 'j');
  control.text = "rank 3 died";
  Control copy;
  const std::string bytes = Encode(control);
  CHECK(Decode(bytes.data(), bytes.size(), &copy));
  CHECK(copy.word == Word::kFailed && copy.source == 1 && copy.culprit == 3);
  CHECK_EQ(copy.job_id, control.job_id);
  CHECK_EQ(copy.text, control.text);
  CHECK(!Decode(bytes.data(), 20, &copy));
  const std::string noise(bytes.size(), 'x');
  CHECK(!Decode(noise.data(), noise.size(), &copy));
  control.text = std::string(kMaxControlText + 1, 't');
  const std::string longer = Encode(control);
  CHECK(Decode(longer.data(), longer.size(), &copy));
  CHECK_EQ(copy.text.size(), kMaxControlText);
}

}  // namespace
}  // namespace smp

int main() {
  smp::TestTagsTellEverythingApart();
  smp::TestNumbersCountPerDirectionPeerAndChannel();
  smp::TestHeaderAndPayloadShareANumber();
  smp::TestFlushAnswersForTheSendsBeforeIt();
  smp::TestASendTellsWhenItHasLeftBeforeItsFlushDoes();
  smp::TestPostedReceivesAreTakenInOrder();
  smp::TestMistakesAreNamed();
  smp::TestWatchWarnsOnceThenFails();
  smp::TestControlWordsSurviveTheWire();
  std::puts("ok   mailbox_test");
}
