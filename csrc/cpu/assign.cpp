#include "objslot/assign.h"

#include <limits>
#include <vector>

#include "objslot/threads.h"

namespace objslot {

namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

// The places of every assignment in a problem, in lexicographic order: the first of several best ones wins.
class Enumeration {
 public:
  Enumeration(int64_t rows, int64_t columns) : rows_(rows), columns_(columns) {
    std::vector<int64_t> row(rows);
    extend(row, 0);
  }

  void solve(const double* scores, int64_t* index) const {
    switch (rows_) {
      case 1: return best<1>(scores, index);
      case 2: return best<2>(scores, index);
      case 3: return best<3>(scores, index);
      case 4: return best<4>(scores, index);
      case 5: return best<5>(scores, index);
    }
  }

 private:
  void extend(std::vector<int64_t>& choice, int64_t row) {
    if (row == rows_) {
      for (int64_t i = 0; i < rows_; ++i) places_.push_back(i * columns_ + choice[i]);
      return;
    }
    for (int64_t column = 0; column < columns_; ++column) {
      bool taken = false;
      for (int64_t i = 0; i < row; ++i) taken |= choice[i] == column;
      if (taken) continue;
      choice[row] = column;
      extend(choice, row + 1);
    }
  }

  template <int rows>
  void best(const double* scores, int64_t* index) const {
    const int64_t* winner = places_.data();
    double most = -infinity;
    const int64_t* const end = winner + places_.size();
    for (const int64_t* place = winner; place != end; place += rows) {
      double total = scores[place[0]];
      for (int i = 1; i < rows; ++i) total += scores[place[i]];
      const bool better = total > most;
      winner = better ? place : winner;
      most = better ? total : most;
    }
    for (int i = 0; i < rows; ++i) index[i] = winner[i] - i * columns_;
  }

  int64_t rows_, columns_;
  std::vector<int64_t> places_;
};

// Shortest augmenting paths with dual prices (Jonker and Volgenant 1987), then exchanges along pairs of no reduced
// cost until the assignment is the lexicographically smallest of the best ones.
class Paths {
 public:
  Paths(int64_t rows, int64_t columns)
      : rows_(rows),
        columns_(columns),
        row_price_(rows),
        column_price_(columns),
        distance_(columns),
        column_of_(rows),
        row_of_(columns),
        previous_(columns),
        scanned_rows_(rows),
        queue_(columns),
        came_from_(columns),
        scanned_(columns) {}

  void solve(const double* scores, int64_t* index) {
    scores_ = scores;
    row_price_.assign(rows_, 0.0);
    column_price_.assign(columns_, 0.0);
    column_of_.assign(rows_, -1);
    row_of_.assign(columns_, -1);
    for (int64_t row = 0; row < rows_; ++row)
      if (!augment(row)) {
        for (int64_t i = 0; i < rows_; ++i) index[i] = i;
        return;
      }
    for (int64_t row = 0; row < rows_; ++row) lower(row);
    for (int64_t i = 0; i < rows_; ++i) index[i] = column_of_[i];
  }

 private:
  double reduced(int64_t row, int64_t column) const {
    return (-scores_[row * columns_ + column] - row_price_[row]) - column_price_[column];
  }

  // Gives `start` a column along the shortest path; false when no allowed one is left.
  bool augment(int64_t start) {
    distance_.assign(columns_, infinity);
    scanned_.assign(columns_, 0);
    int64_t count = 0, row = start, end = -1;
    double reached = 0;
    while (end < 0) {
      scanned_rows_[count++] = row;
      int64_t nearest = -1;
      double least = infinity;
      for (int64_t column = 0; column < columns_; ++column) {
        if (scanned_[column]) continue;
        const double through = reached + reduced(row, column);
        if (through < distance_[column]) {
          distance_[column] = through;
          previous_[column] = row;
        }
        const double value = distance_[column];
        if (value < least || (value == least && nearest >= 0 && row_of_[column] < 0 && row_of_[nearest] >= 0)) {
          nearest = column;
          least = value;
        }
      }
      if (nearest < 0 || least == infinity) return false;
      reached = least;
      scanned_[nearest] = 1;
      if (row_of_[nearest] < 0)
        end = nearest;
      else
        row = row_of_[nearest];
    }
    row_price_[start] += reached;
    for (int64_t i = 1; i < count; ++i)
      row_price_[scanned_rows_[i]] += reached - distance_[column_of_[scanned_rows_[i]]];
    for (int64_t column = 0; column < columns_; ++column)
      if (scanned_[column]) column_price_[column] -= reached - distance_[column];
    do {
      row = previous_[end];
      row_of_[end] = row;
      const int64_t left = column_of_[row];
      column_of_[row] = end;
      end = left;
    } while (row != start);
    return true;
  }

  // Moves `row` to the smallest column that some best assignment with the same earlier rows gives it.
  void lower(int64_t row) {
    const int64_t current = column_of_[row];
    for (int64_t candidate = 0; candidate < current; ++candidate) {
      const int64_t owner = row_of_[candidate];
      if (reduced(row, candidate) != 0 || (owner >= 0 && owner < row) || !passes(row, candidate, current)) continue;
      // Each column of the path goes to the row that reached it.
      for (int64_t at = current; at != candidate;) {
        const int64_t before = came_from_[at], taker = row_of_[before];
        row_of_[at] = taker;
        if (taker >= 0) column_of_[taker] = at;
        at = before;
      }
      row_of_[candidate] = row;
      column_of_[row] = candidate;
      return;
    }
  }

  // Whether exchanges lead from `candidate` on to `current`. A column whose price is 0 may stay free.
  bool passes(int64_t row, int64_t candidate, int64_t current) {
    came_from_.assign(columns_, -1);
    came_from_[candidate] = candidate;
    queue_[0] = candidate;
    for (int64_t head = 0, tail = 1; head < tail; ++head) {
      const int64_t column = queue_[head], owner = row_of_[column];
      for (int64_t after = 0; after < columns_; ++after) {
        if (came_from_[after] >= 0 || (row_of_[after] >= 0 && row_of_[after] < row)) continue;
        if (owner >= 0 ? reduced(owner, after) != 0 : column_price_[after] != 0) continue;
        came_from_[after] = column;
        if (after == current) return true;
        queue_[tail++] = after;
      }
    }
    return false;
  }

  int64_t rows_, columns_;
  const double* scores_ = nullptr;
  std::vector<double> row_price_, column_price_, distance_;
  std::vector<int64_t> column_of_, row_of_, previous_, scanned_rows_, queue_, came_from_;
  std::vector<char> scanned_;
};

bool defined(const double* scores, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!(scores[i] < infinity)) return false;
  return true;
}

}  // namespace

void assign(const double* scores, int64_t count, int64_t rows, int64_t columns, int64_t* index, int threads) {
  const bool enumerated = columns <= largest_enumerated;
  const Enumeration enumeration(enumerated ? rows : 0, enumerated ? columns : 0);
  // Waking a thread costs more than many small problems.
  const int useful = enumerated && count < 4096 ? 1 : threads;
  parallel_for(count, useful, [&](int64_t first, int64_t last, int) {
    Paths paths(enumerated ? 0 : rows, enumerated ? 0 : columns);
    for (int64_t item = first; item < last; ++item) {
      const double* problem = scores + item * rows * columns;
      int64_t* out = index + item * rows;
      if (!defined(problem, rows * columns)) {
        for (int64_t i = 0; i < rows; ++i) out[i] = i;
      } else if (enumerated) {
        enumeration.solve(problem, out);
      } else {
        paths.solve(problem, out);
      }
    }
  });
}

}  // namespace objslot
