#pragma once
// Boxes of 128 bytes a row: of rows that lie `pitch` bytes apart and hold numbers of `element` bytes.
struct CUtensorMap {
  const char* address;
  long rows, pitch;
  int box;
  int element = 1;
};
