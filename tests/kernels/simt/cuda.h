#pragma once
struct CUtensorMap {};
