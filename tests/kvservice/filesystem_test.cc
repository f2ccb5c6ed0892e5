#include "kvservice/cache/filesystem.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

namespace kvservice {
namespace {

class FilesystemTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = ::testing::TempDir() + "kvservice_filesystem_XXXXXX";
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  size_t EntryCount() const {
    return static_cast<size_t>(std::distance(std::filesystem::directory_iterator(folder_),
                                             std::filesystem::directory_iterator()));
  }

  Filesystem* const files_ = SystemFilesystem();
  std::string folder_;
};

TEST_F(FilesystemTest, WritesReplacesReadsRemoves) {
  const std::string path = folder_ + "/file";
  EXPECT_EQ(files_->ReadFile(path, 100).status().code(), absl::StatusCode::kNotFound);
  const std::string large(100000, 'x');
  for (const std::string& contents :
       {std::string("one"), std::string("a\0b", 3), large, std::string()}) {
    ASSERT_TRUE(files_->WriteFile(path, contents).ok());
    const auto read = files_->ReadFile(path, large.size());
    ASSERT_TRUE(read.ok()) << read.status();
    EXPECT_EQ(*read, contents);
    EXPECT_EQ(EntryCount(), 1U) << "no temporary file stays";
  }
  EXPECT_TRUE(files_->RemoveFile(path).ok());
  EXPECT_EQ(files_->RemoveFile(path).code(), absl::StatusCode::kNotFound);
}

TEST_F(FilesystemTest, ReadingHasABound) {
  const std::string path = folder_ + "/file";
  ASSERT_TRUE(files_->WriteFile(path, std::string(20000, 'x')).ok());
  EXPECT_TRUE(files_->ReadFile(path, 20000).ok());
  const absl::Status status = files_->ReadFile(path, 19999).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(std::string(status.message()).find(path), std::string::npos);
}

TEST_F(FilesystemTest, AFailedWriteLeavesTheOldContents) {
  const std::string path = folder_ + "/directory";
  ASSERT_TRUE(files_->CreateDirectory(path).ok());
  EXPECT_FALSE(files_->WriteFile(path, "text").ok()) << "a file cannot replace a directory";
  EXPECT_EQ(EntryCount(), 1U);
  EXPECT_EQ(files_->WriteFile(folder_ + "/none/file", "text").code(), absl::StatusCode::kNotFound);
}

TEST_F(FilesystemTest, DirectoriesArePrivateAndMayExist) {
  const std::string path = folder_ + "/directory";
  ASSERT_TRUE(files_->CreateDirectory(path).ok());
  struct stat made;
  ASSERT_EQ(stat(path.c_str(), &made), 0);
  EXPECT_EQ(made.st_mode & 0777, 0700U);
  EXPECT_TRUE(files_->CreateDirectory(path).ok());
  const std::string file = folder_ + "/file";
  ASSERT_TRUE(files_->WriteFile(file, "").ok());
  EXPECT_FALSE(files_->CreateDirectory(file).ok());
  EXPECT_FALSE(files_->CreateDirectory(folder_ + "/none/directory").ok());
}

}  // namespace
}  // namespace kvservice
