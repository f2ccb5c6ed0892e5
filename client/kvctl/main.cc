// The command line of kvctl. Exit status: 0 done, 1 failed, 2 wrong usage, 3 not found, 4 server
// unavailable, 5 out of time, 6 not allowed, 7 unhealthy, 8 a certificate was wrong.

#include <CLI/CLI.hpp>
#include <functional>
#include <iostream>
#include <string>

#include "client/kvctl/commands.h"
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

struct Flags {
  GlobalOptions global;
  TlsOptions tls;
  std::string output = "table";
  std::string service;
  std::chrono::milliseconds grace{0};
  bool yes = false;
  SequenceListOptions list;
  SequenceDropOptions drop;
  AuditOptions audit;
  ExplainOptions explain;
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
  app->add_flag("-q,--quiet", flags->global.quiet, "Print nothing; the exit status tells");
  app->require_subcommand(1);
  app->fallthrough();
}

void AddServerCommands(CLI::App* app, Flags* flags) {
  AddCommand(app, "health", "Is the server ready? Status 7 if not", flags,
             [flags] { return CheckHealth(flags->global, flags->service); })
      ->add_option("--service", flags->service,
                   "kvservice.v1.AttentionService or kvservice.liveness (default: ready to serve)");
  AddCommand(app, "version", "Version of this program", flags,
             [flags] { return ShowVersion(flags->global); });

  CLI::App* const server = app->add_subcommand("server", "The server as a whole");
  server->require_subcommand(1);
  server->fallthrough();
  AddCommand(server, "info", "Version, device, limits", flags,
             [flags] { return ShowServerInfo(flags->global); });
  AddCommand(server, "stats", "Memory, calls, totals of attention", flags,
             [flags] { return ShowServerStats(flags->global); });
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
  AddCommand(sequence, "get", "One sequence in full", flags,
             [flags] { return ShowSequence(flags->global, flags->name); })
      ->add_option("id", flags->name, "32 hexadecimal digits")
      ->required();
  AddCommand(sequence, "suspend", "To the server's disk and out of its memory", flags,
             [flags] { return SuspendSequence(flags->global, flags->name); })
      ->add_option("id", flags->name, "32 hexadecimal digits, of the endpoint's tenant")
      ->required();
  AddCommand(sequence, "resume", "Back into the server's memory; the generation goes up", flags,
             [flags] { return ResumeSequence(flags->global, flags->name); })
      ->add_option("id", flags->name, "32 hexadecimal digits, of the endpoint's tenant")
      ->required();
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

void AddModelCommands(CLI::App* app, Flags* flags) {
  CLI::App* const model = app->add_subcommand("model", "Registered models");
  model->require_subcommand(1);
  model->fallthrough();
  AddCommand(model, "list", "One line each, ordered by name", flags,
             [flags] { return ListModels(flags->global); });
  AddCommand(model, "get", "One model in full", flags,
             [flags] { return ShowModel(flags->global, flags->name); })
      ->add_option("name", flags->name, "As it was registered")
      ->required();
}

int Main(int argc, const char* const* argv) {
  Flags flags;
  CLI::App app("Looks after a kvservice server.", "kvctl");
  AddGlobalFlags(&app, &flags);
  AddServerCommands(&app, &flags);
  AddSequenceCommands(&app, &flags);
  AddAuditCommand(&app, &flags);
  AddExplainCommand(&app, &flags);
  AddModelCommands(&app, &flags);
  app.footer(kLevelsHelp);
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
  return flags.command();
}

}  // namespace
}  // namespace kvservice::client

int main(int argc, char** argv) { return kvservice::client::Main(argc, argv); }
