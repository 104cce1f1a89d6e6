#pragma once
// Rows of 128 bytes.
struct CUtensorMap {
  const char* address;
  long rows, pitch;
  int box;
};
