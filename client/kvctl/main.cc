// The command line of kvctl. Its exit status is in kExitHelp.

#include <CLI/CLI.hpp>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "client/kvctl/bench.h"
#include "client/kvctl/commands.h"
#include "client/kvctl/completion.h"
#include "client/kvctl/live.h"
#include "client/kvctl/outcome.h"
#include "client/kvctl/quota.h"
#include "client/kvctl/text.h"

namespace kvservice::client {
namespace {

// As many as the server computes for one caller.
constexpr uint32_t kAuditRowsMax = 64;

constexpr char kLevelsHelp[] =
    "Levels of certificates, weakest first:\n"
    "  none           says nothing about what was not attended; the bound is 1\n"
    "  confidence     the bound may be wrong with at most the failure probability, over random\n"
    "                 numbers that only the server knows\n"
    "  deterministic  the bound always holds\n"
    "  exact          every key was scored, or everything was attended\n"
    "A bound is an upper bound of the share of softmax attention that was not attended, with the\n"
    "query as received and the keys as stored. Bounds are printed rounded up.";

constexpr char kExitHelp[] =
    "Exit status: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 server unavailable, 5 out of\n"
    "time, 6 not allowed, 7 unhealthy, 8 a certificate was wrong, 130 interrupted.\n\n";

// How often commands that go on look again, unless --watch says.
constexpr std::chrono::milliseconds kWatchDefault{2000};
// For a person who has pressed tab.
constexpr std::chrono::milliseconds kCompletionTimeout{200};
constexpr size_t kCompletionNamesMax = 1000;
constexpr char kNoMaximumWord[] = "none";

struct Flags {
  GlobalOptions global;
  TlsOptions tls;
  std::string output = "table";
  std::string service;
  std::chrono::milliseconds grace{0};
  bool yes = false;
  SequenceListOptions list;
  SequenceDropOptions drop;
  TransferOptions transfer;
  AuditOptions audit;
  ExplainOptions explain;
  SequenceForkOptions fork;
  BlockOptions block;
  QuotaListOptions quota_list;
  QuotaSetOptions quota_set;
  BenchOptions bench;
  uint32_t top_count = 20;
  uint32_t ping_count = 10;
  std::string shell = "bash";
  std::string name;
  // The command that was chosen.
  std::function<int()> command;
};

CLI::Option* AddDuration(CLI::App* app, const std::string& flag, const std::string& help,
                         std::chrono::milliseconds* target) {
  return app
      ->add_option_function<std::string>(
          flag, [target](const std::string& text) { *target = *ParseDuration(text); }, help)
      ->check([](const std::string& text) -> std::string {
        if (ParseDuration(text).has_value()) return "";
        return "'" + text + "' is not like 500ms, 5s or 2m";
      })
      ->type_name("TIME");
}

// The innermost command that was given.
std::string CommandName(const CLI::App& app) {
  const CLI::App* command = &app;
  while (!command->get_subcommands().empty()) command = command->get_subcommands().front();
  return command->get_name();
}

// A command without flags of its own.
CLI::App* AddCommand(CLI::App* app, const std::string& name, const std::string& help, Flags* flags,
                     std::function<int()> run) {
  CLI::App* const command = app->add_subcommand(name, help);
  command->callback([flags, run = std::move(run)] { flags->command = run; });
  return command;
}

void AddTlsFlags(CLI::App* app, Flags* flags) {
  CLI::Option* const ca =
      app->add_option("--tls-ca", flags->tls.ca_file,
                      "PEM file of the authorities that sign the server's certificate; with it "
                      "HOST:PORT is spoken to with TLS")
          ->envname("KVCTL_TLS_CA")
          ->check(CLI::ExistingFile)
          ->type_name("FILE");
  CLI::Option* const certificate = app->add_option("--tls-cert", flags->tls.certificate_file,
                                                   "PEM file of this client's certificate")
                                       ->envname("KVCTL_TLS_CERT")
                                       ->check(CLI::ExistingFile)
                                       ->type_name("FILE");
  CLI::Option* const key =
      app->add_option("--tls-key", flags->tls.key_file, "PEM file of the certificate's key")
          ->envname("KVCTL_TLS_KEY")
          ->check(CLI::ExistingFile)
          ->type_name("FILE");
  ca->needs(certificate, key);
  certificate->needs(ca);
  key->needs(ca);
  app->add_option("--tls-server-name", flags->tls.server_name,
                  "Name the server's certificate must have (default: the endpoint's host)")
      ->envname("KVCTL_TLS_SERVER_NAME")
      ->needs(ca)
      ->type_name("NAME");
}

void AddGlobalFlags(CLI::App* app, Flags* flags) {
  flags->global.endpoint = DefaultEndpoint();
  app->add_option("--endpoint", flags->global.endpoint, "Data side: unix:/path or HOST:PORT")
      ->envname("KVCTL_ENDPOINT")
      ->type_name("ADDRESS")
      ->capture_default_str();
  app->add_option("--admin-endpoint", flags->global.admin_endpoint,
                  "Admin side (default: the data side's path with .admin after it)")
      ->envname("KVCTL_ADMIN_ENDPOINT")
      ->type_name("ADDRESS");
  AddTlsFlags(app, flags);
  AddDuration(app, "--timeout", "For the whole command", &flags->global.timeout)
      ->envname("KVCTL_TIMEOUT")
      ->default_str("30s");
  app->add_option("-o,--output", flags->output, "How to print")
      ->check(CLI::IsMember({"table", "json"}))
      ->envname("KVCTL_OUTPUT")
      ->type_name("FORMAT")
      ->capture_default_str();
  AddDuration(app, "-w,--watch",
              "Repeat a command that changes nothing, so often; in JSON one "
              "line each time",
              &flags->global.watch);
  app->add_option("--watch-count", flags->global.watch_count,
                  "End after so many times (default: when interrupted)")
      ->check(CLI::Range(1U, 1'000'000'000U))
      ->type_name("COUNT");
  app->add_flag("-q,--quiet", flags->global.quiet, "Print nothing; the exit status tells");
  app->require_subcommand(1);
  app->fallthrough();
}

void AddServerCommands(CLI::App* app, Flags* flags) {
  AddCommand(app, "health", "Is the server ready? Status 7 if not", flags,
             [flags] { return CheckHealth(flags->global, flags->service); })
      ->add_option("--service", flags->service,
                   "kvservice.v1.AttentionService or kvservice.liveness (default: ready to serve)");
  AddCommand(app, "ping", "How long a call that does nothing takes", flags,
             [flags] { return Ping(flags->global, flags->ping_count); })
      ->add_option("-c,--count", flags->ping_count, "Calls; the first one is not counted")
      ->check(CLI::Range(1U, 100'000U))
      ->type_name("COUNT")
      ->capture_default_str();
  AddCommand(app, "stats", "The same as server stats", flags,
             [flags] { return ShowServerStats(flags->global); });
  AddCommand(app, "version", "Version of this program", flags,
             [flags] { return ShowVersion(flags->global); });

  CLI::App* const server = app->add_subcommand("server", "The server as a whole");
  server->require_subcommand(1);
  server->fallthrough();
  AddCommand(server, "info", "Version, device, limits", flags,
             [flags] { return ShowServerInfo(flags->global); });
  AddCommand(server, "stats", "Memory, calls, totals of attention", flags,
             [flags] { return ShowServerStats(flags->global); });
  AddCommand(server, "verify", "Read everything on disk and check it; status 7 if it was damaged",
             flags, [flags] { return VerifyStore(flags->global); })
      ->footer(
          "Takes as long as reading takes: see --timeout. Damage that memory can mend is mended.");
  CLI::App* const drain =
      AddCommand(server, "drain", "Finish what is running, refuse the rest, end the server", flags,
                 [flags] { return DrainServer(flags->global, flags->grace, flags->yes); });
  AddDuration(drain, "--grace", "For calls in flight (default: the server's)", &flags->grace);
  drain->add_flag("--yes", flags->yes, "Do not ask");
}

void AddSequenceCommands(CLI::App* app, Flags* flags) {
  CLI::App* const sequence = app->add_subcommand("sequence", "Sequences of all tenants");
  sequence->alias("seq");
  sequence->require_subcommand(1);
  sequence->fallthrough();
  CLI::App* const list = AddCommand(sequence, "list", "One line each, ordered by id", flags,
                                    [flags] { return ListSequences(flags->global, flags->list); });
  list->add_option("--tenant", flags->list.tenant, "Only this tenant's");
  list->add_option("--limit", flags->list.limit, "At most so many")
      ->check(CLI::Range(size_t{1}, size_t{1'000'000}))
      ->type_name("COUNT")
      ->capture_default_str();
  CLI::App* const get = AddCommand(sequence, "get", "One sequence in full", flags,
                                   [flags] { return ShowSequence(flags->global, flags->name); });
  get->alias("describe");
  get->add_option("id", flags->name, "32 hexadecimal digits")->required();
  AddCommand(sequence, "suspend", "To the server's disk and out of its memory", flags,
             [flags] { return SuspendSequence(flags->global, flags->name); })
      ->add_option("id", flags->name, "32 hexadecimal digits, of the endpoint's tenant")
      ->required();
  AddCommand(sequence, "resume", "Back into the server's memory; the generation goes up", flags,
             [flags] { return ResumeSequence(flags->global, flags->name); })
      ->add_option("id", flags->name, "32 hexadecimal digits, of the endpoint's tenant")
      ->required();
  CLI::App* const fork =
      AddCommand(sequence, "fork", "A copy-on-write child; it ends with its lease", flags,
                 [flags] { return ForkSequence(flags->global, flags->fork); });
  fork->add_option("id", flags->fork.hex_id, "32 hexadecimal digits, of the endpoint's tenant")
      ->required();
  fork->add_option("--length", flags->fork.length_tokens,
                   "Its first tokens alone (default: all that every layer has)")
      ->type_name("COUNT");
  AddDuration(fork, "--lease", "Until it is forgotten (default: the server's)", &flags->fork.lease);
  CLI::App* const drop =
      AddCommand(sequence, "drop", "Forget a sequence and free its memory", flags, [flags] {
        flags->drop.yes = flags->yes;
        return DropSequence(flags->global, flags->drop);
      });
  drop->add_option("id", flags->drop.hex_id, "32 hexadecimal digits")->required();
  drop->add_option("--expected-generation", flags->drop.expected_generation,
                   "Only if the sequence is at this generation");
  drop->add_flag("--yes", flags->yes, "Do not ask");
}

void AddTransferCommand(CLI::App* sequence, Flags* flags) {
  CLI::App* const transfer =
      AddCommand(sequence, "transfer", "Send a sequence from this server to another one", flags,
                 [flags] { return TransferSequence(flags->global, flags->transfer); });
  transfer
      ->add_option("id", flags->transfer.hex_id, "32 hexadecimal digits, of the endpoint's tenant")
      ->required();
  transfer
      ->add_option("target", flags->transfer.target_endpoint,
                   "The other server, one of this server's --transfer-targets")
      ->type_name("ADDRESS")
      ->required();
  transfer->add_flag("--move", flags->transfer.move, "Drop it here once the other has it");
  transfer->footer("Repeating goes on where a broken transfer stopped.");
}

// With a maximum, `none` is one too.
void AddBytes(CLI::App* app, const std::string& flag, const std::string& help, bool is_maximum,
              std::optional<uint64_t>* target) {
  app->add_option_function<std::string>(
         flag,
         [target](const std::string& text) {
           *target = text == kNoMaximumWord ? kNoMaximum : *ParseBytes(text);
         },
         help)
      ->check([is_maximum](const std::string& text) -> std::string {
        if (ParseBytes(text).has_value() || (is_maximum && text == kNoMaximumWord)) return "";
        return "'" + text + "' is not like 4GiB, 512MiB or 65536";
      })
      ->type_name("BYTES");
}

void AddQuotaCommands(CLI::App* app, Flags* flags) {
  CLI::App* const quota = app->add_subcommand("quota", "What tenants may use, and use");
  quota->require_subcommand(1);
  quota->fallthrough();
  QuotaListOptions* const listed = &flags->quota_list;
  CLI::App* const list =
      AddCommand(quota, "list", "One line for each tenant, ordered by name", flags,
                 [flags] { return ListQuotas(flags->global, flags->quota_list); });
  list->add_option("--tenant", listed->tenant, "This one alone, whatever it uses");
  list->add_option("--limit", listed->limit, "At most so many")
      ->check(CLI::Range(size_t{1}, size_t{1'000'000}))
      ->type_name("COUNT")
      ->capture_default_str();
  QuotaSetOptions* const to = &flags->quota_set;
  CLI::App* const set =
      AddCommand(quota, "set", "From now on and until the server restarts", flags, [flags] {
        flags->quota_set.tenant = flags->name;
        flags->quota_set.yes = flags->yes;
        return SetQuota(flags->global, flags->quota_set);
      });
  set->add_option("tenant", flags->name, "Whose; it need not be there yet")->required();
  AddBytes(set, "--pool-max", "Most memory its blocks may take, or none", true,
           &to->pool_bytes_max);
  AddBytes(set, "--pool-reserved", "Memory that others cannot take", false,
           &to->pool_bytes_reserved);
  AddBytes(set, "--disk-max", "Most bytes on disk, or none", true, &to->disk_bytes_max);
  set->add_flag("--yes", flags->yes, "Do not ask");
  set->footer("What is not given stays as it is. What shall last belongs into --tenant-quota.");
  AddCommand(quota, "reset", "As the server was configured", flags,
             [flags] { return ResetQuota(flags->global, flags->name); })
      ->add_option("tenant", flags->name, "Whose")
      ->required();
}

void AddAuditCommand(CLI::App* app, Flags* flags) {
  CLI::App* const audit =
      AddCommand(app, "audit", "Compare certificates with the truth; status 8 if one was wrong",
                 flags, [flags] { return AuditCalls(flags->global, flags->audit); });
  audit->add_option("id", flags->audit.hex_id,
                    "Sequence of which kept rows are computed again, 32 hexadecimal digits "
                    "(default: show what the server's own audits have found)");
  audit->add_option("--calls", flags->audit.call_count, "Kept rows to compute again")
      ->check(CLI::Range(1U, kAuditRowsMax))
      ->type_name("COUNT")
      ->capture_default_str();
  audit->add_option("--keep-next", flags->audit.keep_next, "Keep so many rows from now on")
      ->check(CLI::Range(1U, kAuditRowsMax))
      ->type_name("COUNT");
  audit
      ->add_option("--replay", flags->audit.replay,
                   "Compute one kept row again with the random numbers it had, and compare bit "
                   "by bit; as its reply named them")
      ->type_name("EPOCH:SECRET:CALL:ROW");
  audit->footer(kLevelsHelp);
}

void AddExplainCommand(CLI::App* app, Flags* flags) {
  CLI::App* const explain = AddCommand(
      app, "explain", "What limits on dropped mass would cost, for the latest query of a layer",
      flags, [flags] { return ExplainSequence(flags->global, flags->explain); });
  explain->add_option("id", flags->explain.hex_id, "Sequence, 32 hexadecimal digits")->required();
  explain->add_option("--layer", flags->explain.layer, "Layer, from 0")->capture_default_str();
  explain
      ->add_option("--limits", flags->explain.limits,
                   "Limits to try, with commas between them (default: 0.2,0.1,0.05,0.02,0.01)")
      ->delimiter(',')
      ->type_name("SHARES");
  explain->footer(
      "BYTES is the share of what dense attention reads: keys and values, sketches, samples.\n"
      "DROPPED is the largest bound of the KV head's query heads, rounded up.");
}

void AddBlockCommands(CLI::App* app, Flags* flags) {
  CLI::App* const block = app->add_subcommand(
      "block", "Blocks of 64 tokens: where they are, checksums, norms, attention");
  block->require_subcommand(1);
  block->fallthrough();
  const auto add_flags = [flags](CLI::App* command) {
    command->add_option("id", flags->block.hex_id, "Sequence, 32 hexadecimal digits")->required();
    command->add_option("--layer", flags->block.layer,
                        "This layer alone, with the share of attention that its latest query pays "
                        "to the block (it is attended densely for that)");
  };
  CLI::App* const list = AddCommand(block, "list", "One line each", flags,
                                    [flags] { return ListBlocks(flags->global, flags->block); });
  add_flags(list);
  list->add_option("--first", flags->block.index, "From this one on")->capture_default_str();
  list->add_option("--limit", flags->block.limit, "At most so many")
      ->check(CLI::Range(1U, 16'384U))
      ->type_name("COUNT")
      ->capture_default_str();
  CLI::App* const get = AddCommand(block, "get", "One block in full", flags,
                                   [flags] { return ShowBlock(flags->global, flags->block); });
  get->alias("describe");
  add_flags(get);
  get->add_option("index", flags->block.index, "From 0")->required();
}

void AddLiveCommands(CLI::App* app, Flags* flags) {
  CLI::App* const top =
      AddCommand(app, "top", "What happens now: rates and the busiest sequences", flags,
                 [flags] { return ShowTop(flags->global, flags->top_count); });
  top->add_option("--sequences", flags->top_count, "So many of them")
      ->check(CLI::Range(0U, 10'000U))
      ->type_name("COUNT")
      ->capture_default_str();
  AddCommand(app, "watch", "A line for each sequence that comes, goes, or changes its place", flags,
             [flags] { return WatchSequences(flags->global); })
      ->footer(
          "It compares what is there every 2 s (--watch): what comes and goes in between is "
          "not seen.");
}

void AddBenchCommand(CLI::App* app, Flags* flags) {
  CLI::App* const bench =
      AddCommand(app, "bench", "Speed of the server from here, with random data", flags,
                 [flags] { return RunBench(flags->global, flags->bench); });
  BenchOptions* const of = &flags->bench;
  const auto count = [bench](const char* flag, uint32_t* target, uint32_t maximum,
                             const char* help) {
    bench->add_option(flag, *target, help)
        ->check(CLI::Range(1U, maximum))
        ->type_name("COUNT")
        ->capture_default_str();
  };
  count("--layers", &of->layers, 128, "Layers of the model");
  count("--query-heads", &of->query_heads, 128, "Query heads");
  count("--kv-heads", &of->kv_heads, 128, "KV heads");
  count("--head-dim", &of->head_dim, 256, "Channels of a head");
  count("--tokens", &of->tokens, 1U << 20, "Tokens to fill the sequence with");
  count("--count", &of->count, 10'000'000, "Attends, one after the other");
  bench->add_option("--policy", of->policy, "How tokens are chosen")
      ->check(CLI::IsMember({"dense", "certified", "cis", "cpe", "scan"}))
      ->type_name("NAME")
      ->capture_default_str();
  bench->footer(
      "Registers a model whose name tells its shape (it stays known until the server restarts) "
      "and\n"
      "makes one sequence, which is dropped. Shares of tokens read are those of random keys, "
      "which\n"
      "are harder than those of any real model.");
}

void AddCompletionCommand(CLI::App* app, Flags* flags) {
  AddCommand(app, "completion", "For your shell: source <(kvctl completion bash)", flags,
             [flags] {
               if (!flags->global.quiet) std::cout << BashCompletion();
               return static_cast<int>(kExitOk);
             })
      ->add_option("shell", flags->shell, "bash")
      ->check(CLI::IsMember({"bash"}))
      ->required();
}

void AddModelCommands(CLI::App* app, Flags* flags) {
  CLI::App* const model = app->add_subcommand("model", "Registered models");
  model->require_subcommand(1);
  model->fallthrough();
  AddCommand(model, "list", "One line each, ordered by name", flags,
             [flags] { return ListModels(flags->global); });
  CLI::App* const get = AddCommand(model, "get", "One model in full", flags,
                                   [flags] { return ShowModel(flags->global, flags->name); });
  get->alias("describe");
  get->add_option("name", flags->name, "As it was registered")->required();
}

// Commands that change something, or that end by themselves.
bool MayRepeat(const CLI::App& app) {
  const std::string verb = CommandName(app);
  for (const char* const once : {"drain", "drop", "fork", "suspend", "resume", "transfer", "bench",
                                 "ping", "completion", "version", "set", "reset", "verify"}) {
    if (verb == once) return false;
  }
  return true;
}

int RunCommand(const CLI::App& app, Flags* flags) {
  const std::string verb = CommandName(app);
  const bool goes_on = verb == "top" || verb == "watch";
  if (goes_on && flags->global.watch.count() == 0) flags->global.watch = kWatchDefault;
  if (flags->global.watch.count() == 0) return flags->command();
  if (goes_on) return flags->command();
  if (!MayRepeat(app)) return Usage(flags->global, "--watch is not for " + verb);
  return Repeat(flags->global, flags->command);
}

// Of the endpoint's server; nothing when it does not answer in time.
std::vector<std::string> NamesOnServer(const GlobalOptions& options,
                                       const std::string& positional) {
  std::vector<std::string> names;
  const std::unique_ptr<ServerCalls> calls = Connect(options);
  bool more = false;
  if (positional == "id") {
    const auto sequences = calls->ListSequences("", kCompletionNamesMax, &more);
    if (!sequences.ok()) return names;
    for (const auto& sequence : *sequences) names.push_back(HexOfId(sequence.handle().id()));
  } else if (positional == "name") {
    const auto models = calls->ListModels();
    if (!models.ok()) return names;
    for (const auto& model : *models) names.push_back(model.name());
  } else if (positional == "tenant") {
    const auto usages = calls->ListTenants("", kCompletionNamesMax, &more);
    if (!usages.ok()) return names;
    for (const auto& usage : *usages) names.push_back(usage.tenant());
  }
  return names;
}

int CompleteWords(const CLI::App& app, const std::vector<std::string>& words) {
  GlobalOptions options;
  options.timeout = kCompletionTimeout;
  const auto take = [&](const char* variable, const std::string& flag, std::string* target) {
    if (const char* const value = std::getenv(variable)) *target = value;
    for (size_t i = 0; i + 1 < words.size(); ++i) {
      if (words[i] == flag) *target = words[i + 1];
    }
  };
  options.endpoint = DefaultEndpoint();
  take("KVCTL_ENDPOINT", "--endpoint", &options.endpoint);
  options.admin_endpoint = DefaultAdminEndpoint(options.endpoint);
  take("KVCTL_ADMIN_ENDPOINT", "--admin-endpoint", &options.admin_endpoint);
  const auto names = [&](const std::string& positional) {
    return NamesOnServer(options, positional);
  };
  for (const std::string& word : Complete(app, words, names)) std::cout << word << "\n";
  return kExitOk;
}

int Main(int argc, const char* const* argv) {
  Flags flags;
  CLI::App app("Looks after a kvservice server.", "kvctl");
  AddGlobalFlags(&app, &flags);
  AddServerCommands(&app, &flags);
  AddLiveCommands(&app, &flags);
  AddSequenceCommands(&app, &flags);
  AddTransferCommand(app.get_subcommand("sequence"), &flags);
  AddBlockCommands(&app, &flags);
  AddModelCommands(&app, &flags);
  AddQuotaCommands(&app, &flags);
  AddAuditCommand(&app, &flags);
  AddExplainCommand(&app, &flags);
  AddBenchCommand(&app, &flags);
  AddCompletionCommand(&app, &flags);
  app.set_help_all_flag("--help-all", "Help for all commands");
  app.footer(std::string(kExitHelp) + kLevelsHelp);
  if (argc > 1 && std::string(argv[1]) == kCompleteWord) {
    return CompleteWords(app, {argv + 2, argv + argc});
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? kExitOk : kExitUsage;
  }
  if (!flags.tls.ca_file.empty()) flags.global.tls = flags.tls;
  flags.global.json = flags.output == "json";
  if (flags.global.admin_endpoint.empty()) {
    flags.global.admin_endpoint = DefaultAdminEndpoint(flags.global.endpoint);
  }
  return RunCommand(app, &flags);
}

}  // namespace
}  // namespace kvservice::client

int main(int argc, char** argv) { return kvservice::client::Main(argc, argv); }
