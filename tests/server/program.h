// Programs of this project as processes: started, talked to, ended.

#ifndef KVSERVICE_TESTS_SERVER_PROGRAM_H_
#define KVSERVICE_TESTS_SERVER_PROGRAM_H_

#include <sys/types.h>

#include <string>
#include <vector>

#include "kvservice/server/transport.h"

namespace kvservice::testing {

class Program {
 public:
  // Starts `name` of the folder in $KVSERVICE_BIN_DIR. Standard input is empty.
  Program(const std::string& name, std::vector<std::string> arguments);
  // Kills it if it still runs.
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  // Reads standard output up to and with the line; false when it ends before.
  bool WaitForLine(const std::string& line);
  // Takes what standard output has to give now, without waiting; false at its end.
  bool ReadMore();
  void Signal(int signal) const;
  pid_t pid() const { return pid_; }
  // Waits for the end; the exit status, or 128 + the signal that ended it, or -1 if it never
  // started.
  int Wait();
  // After Wait, all of it; before, what was read so far.
  const std::string& output() const { return output_; }
  const std::string& errors() const { return errors_; }

 private:
  pid_t pid_ = -1;
  FileDescriptor output_pipe_;
  FileDescriptor error_pipe_;
  std::string output_;
  std::string errors_;
};

}  // namespace kvservice::testing

#endif  // KVSERVICE_TESTS_SERVER_PROGRAM_H_
