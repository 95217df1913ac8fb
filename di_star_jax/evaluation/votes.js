// SPDX-License-Identifier: Apache-2.0
// Statistics of blind votes between two runs, and their order; free of the page.
"use strict";

/** 95 % Wilson interval of a share, Wilson 1927. */
function wilson(wins, total) {
  const z = 1.959964;
  const share = wins / total;
  const centre = (share + (z * z) / (2 * total)) / (1 + (z * z) / total);
  const half = (z / (1 + (z * z) / total)) * Math.sqrt((share * (1 - share)) / total + (z * z) / (4 * total * total));
  return [Math.max(0, centre - half), Math.min(1, centre + half)];
}

/** Votes for the first run, for neither, and for the second. */
function tally(votes) {
  const ties = votes.filter((vote) => vote.choice === "tie").length;
  const wins = votes.filter((vote) => vote.choice !== "tie" && vote[vote.choice] === 0).length;
  return { wins, ties, losses: votes.length - ties - wins };
}

/**
 * Difference of two runs' strengths of Bradley and Terry, 1952, with its standard error; null where it is infinite.
 * A tie is half a win for each.
 */
function strength(wins, losses) {
  if (!wins || !losses) return null;
  return { value: Math.log(wins / losses), stderr: Math.sqrt(1 / wins + 1 / losses) };
}

/** Random numbers in [0, 1) from a seed (mulberry32), for a reload must find the same order. */
function randomNumbers(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** Pairs in random order, and on random sides. */
function shuffled(pairs, seed) {
  const random = randomNumbers(seed);
  const order = [...pairs];
  for (let i = order.length - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order.map((pair) => (random() < 0.5 ? pair : { ...pair, left: pair.right, right: pair.left }));
}
