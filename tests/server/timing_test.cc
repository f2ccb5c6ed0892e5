// Whether the time of an answer tells one tenant about another's sequences. A stranger asks about
// ids that are another tenant's and about ids that do not exist, and reads prompts that another has
// in the cache and prompts that nobody has, in random order; if the time tells them apart better
// than a coin does, it is seen in the area under the curve of a classifier that looks at the time
// alone (0.5 = a coin). The same probe must tell an owner's own apart, else it is blind and proves
// nothing: a machine that is busy with other things does that, and it looks again.

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kvservice/v1/attention.grpc.pb.h"
#include "kvservice/v1/sequence.grpc.pb.h"
#include "tests/server/served_engine.h"

namespace kvservice::testing {
namespace {

constexpr int kSequences = 2;
constexpr uint32_t kLength = 1500;
// The error of an area from 2,000 samples of each kind is 0.009.
constexpr int kSamples = 2000;
constexpr int kControlSamples = 300;
// A prompt's are dearer: 0.012 from so many.
constexpr int kPromptSamples = 1200;
constexpr int kPrompts = 40;
constexpr uint32_t kPromptTokens = 2 * kBlockTokens;
constexpr double kAreaMax = 0.55;
constexpr double kControlMin = 0.9;
constexpr int kLooksMax = 5;

// Of the two kinds, the share of pairs in which the first took longer.
double Area(const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<std::pair<double, int>> all;
  all.reserve(a.size() + b.size());
  for (const double x : a) all.emplace_back(x, 0);
  for (const double x : b) all.emplace_back(x, 1);
  std::sort(all.begin(), all.end());
  double pairs = 0;
  double below = 0;  // of b
  for (const auto& [time, kind] : all) {
    if (kind == 1) {
      ++below;
    } else {
      pairs += below;
    }
  }
  return pairs / (static_cast<double>(a.size()) * static_cast<double>(b.size()));
}

class TimingTest : public ::testing::Test {
 protected:
  static std::string Id(std::mt19937_64* random) {
    std::string id(16, '\0');
    for (char& byte : id) byte = static_cast<char>((*random)());
    return id;
  }

  std::string NewSequence(v1::SequenceService::Stub* sequences) const {
    v1::CreateRequest create;
    create.set_model(kModel);
    v1::CreateResponse created;
    EXPECT_EQ(ErrorText(sequences->Create(NewContext().get(), create, &created)), "OK");
    const v1::SequenceHandle handle = created.sequence().handle();
    v1::AppendResponse appended;
    const auto context = NewContext();
    const auto writer = sequences->Append(context.get(), &appended);
    writer->Write(MakeAppend(served_.model(), handle, 0, 0, Counting(0, kLength)));
    writer->WritesDone();
    EXPECT_EQ(ErrorText(writer->Finish()), "OK");
    return handle.id();
  }

  // Microseconds until the answer is there.
  double Ask(v1::AttentionService::Stub* attention, const std::string& id) const {
    v1::SequenceHandle handle;
    handle.set_id(id);
    handle.set_generation(1);
    const v1::AttendRequest request = MakeAttend(served_.model(), handle, 0, kLength, {kLength});
    v1::AttendResponse response;
    const auto context = NewContext();
    const auto begin = std::chrono::steady_clock::now();
    EXPECT_TRUE(attention->Attend(context.get(), request, &response).ok());
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin)
        .count();
  }

  // The area between answers about `ids` and about ids that do not exist; at least 0.5.
  double Probe(v1::AttentionService::Stub* attention, const std::vector<std::string>& ids,
               int samples, std::mt19937_64* random) const {
    std::vector<double> there;
    std::vector<double> missing;
    for (int i = 0; i < 2 * samples; ++i) {
      const bool asks_there = (*random)() % 2 == 0;
      const std::string id = asks_there ? ids[(*random)() % ids.size()] : Id(random);
      (asks_there ? there : missing).push_back(Ask(attention, id));
    }
    const double area = Area(there, missing);
    return std::max(area, 1 - area);
  }

  // A prompt with what is sent of it, so that sending is what is timed.
  struct Prompt {
    v1::CreateRequest create;
    std::vector<v1::AppendRequest> appends;
  };
  // Microseconds until a sequence with the prompt is there, and until all its tokens are. Nothing
  // is appended if all is matched.
  struct PromptTimes {
    double created = 0;
    double whole = 0;
  };
  static PromptTimes Read(v1::SequenceService::Stub* sequences, Prompt* prompt, bool keeps) {
    v1::CreateResponse created;
    const auto context = NewContext();
    const auto append_context = NewContext();
    const auto begin = std::chrono::steady_clock::now();
    const auto since = [begin] {
      return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin)
          .count();
    };
    PromptTimes times;
    EXPECT_EQ(ErrorText(sequences->Create(context.get(), prompt->create, &created)), "OK");
    times.created = since();
    const v1::SequenceHandle handle = created.sequence().handle();
    if (created.matched_tokens() < kPromptTokens) {
      v1::AppendResponse appended;
      const auto writer = sequences->Append(append_context.get(), &appended);
      for (v1::AppendRequest& append : prompt->appends) {
        *append.mutable_handle() = handle;
        writer->Write(append);
      }
      writer->WritesDone();
      EXPECT_EQ(ErrorText(writer->Finish()), "OK");
    }
    times.whole = since();
    if (keeps) return times;
    v1::DropRequest drop;
    *drop.mutable_handle() = handle;
    v1::DropResponse dropped;
    EXPECT_EQ(ErrorText(sequences->Drop(NewContext().get(), drop, &dropped)), "OK");
    return times;
  }

  // The areas between reading prompts that are cached and prompts that are not.
  static PromptTimes ProbePrompts(v1::SequenceService::Stub* sequences, std::vector<Prompt>* cached,
                                  std::vector<Prompt>* others, int samples,
                                  std::mt19937_64* random) {
    std::vector<double> created[2];
    std::vector<double> whole[2];
    for (int i = 0; i < 2 * samples; ++i) {
      const bool asks_cached = (*random)() % 2 == 0;
      std::vector<Prompt>& prompts = asks_cached ? *cached : *others;
      const PromptTimes times = Read(sequences, &prompts[(*random)() % prompts.size()], false);
      created[asks_cached ? 1 : 0].push_back(times.created);
      whole[asks_cached ? 1 : 0].push_back(times.whole);
    }
    const auto area = [](const std::vector<double>* times) {
      const double one_sided = Area(times[0], times[1]);
      return std::max(one_sided, 1 - one_sided);
    };
    return {.created = area(created), .whole = area(whole)};
  }

  std::vector<Prompt> Prompts(std::mt19937_64* random) const {
    std::vector<Prompt> prompts(kPrompts);
    for (Prompt& prompt : prompts) {
      Words ids(kPromptTokens);
      for (uint32_t& id : ids) id = static_cast<uint32_t>((*random)() % 128'000);
      prompt.create.set_model(kModel);
      prompt.create.mutable_token_ids()->Add(ids.begin(), ids.end());
      for (uint32_t layer = 0; layer < served_.model().layer_count; ++layer) {
        prompt.appends.push_back(MakeAppend(served_.model(), {}, layer, 0, ids));
      }
    }
    return prompts;
  }

  static ServedEngineOptions Roomy() {
    ServedEngineOptions options;
    options.engine.pool_bytes = 512 * BlockBytes(SmallModel(options.layer_count));
    options.engine.sequences_max = options.engine.sequences_per_tenant_max = 4 * kPrompts;
    return options;
  }

  ServedEngine served_{Roomy()};
};

TEST_F(TimingTest, AnswersAboutForeignAndMissingSequencesTakeAsLong) {
  std::mt19937_64 random(20260302);
  const auto ours = v1::AttentionService::NewStub(served_.Connect());
  const auto theirs = v1::AttentionService::NewStub(served_.ConnectAsOther());
  const auto sequences = v1::SequenceService::NewStub(served_.Connect());
  std::vector<std::string> ids(kSequences);
  for (std::string& id : ids) id = NewSequence(sequences.get());
  double control = 0.0;
  double area = 0.0;
  for (int look = 0; look < kLooksMax && control < kControlMin; ++look) {
    control = Probe(ours.get(), ids, kControlSamples, &random);
    area = Probe(theirs.get(), ids, kSamples, &random);
    EXPECT_LE(area, kAreaMax);
  }
  RecordProperty("area", std::to_string(area));
  RecordProperty("control", std::to_string(control));
  EXPECT_GE(control, kControlMin);
}

TEST_F(TimingTest, PromptsThatAnotherTenantHasTakeAsLongAsPromptsThatNobodyHas) {
  std::mt19937_64 random(20261130);
  const auto ours = v1::SequenceService::NewStub(served_.Connect());
  const auto theirs = v1::SequenceService::NewStub(served_.ConnectAsOther());
  std::vector<Prompt> cached = Prompts(&random);
  std::vector<Prompt> others = Prompts(&random);
  for (Prompt& prompt : cached) Read(ours.get(), &prompt, true);
  PromptTimes control;
  PromptTimes area;
  for (int look = 0; look < kLooksMax && control.whole < kControlMin; ++look) {
    control = ProbePrompts(ours.get(), &cached, &others, kControlSamples, &random);
    area = ProbePrompts(theirs.get(), &cached, &others, kPromptSamples, &random);
    EXPECT_LE(area.created, kAreaMax);
    EXPECT_LE(area.whole, kAreaMax);
  }
  RecordProperty("area_created", std::to_string(area.created));
  RecordProperty("area_whole", std::to_string(area.whole));
  RecordProperty("control_created", std::to_string(control.created));
  RecordProperty("control", std::to_string(control.whole));
  EXPECT_GE(control.whole, kControlMin);
}

}  // namespace
}  // namespace kvservice::testing
