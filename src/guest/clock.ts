/**
 * A guest's wall clock. Hello tells the guest when its connection came, and so the clock is fast by what the host took to
 * notice it: nothing, or on a busy host too much. What the guest's clock says at its answer lies between question and answer
 * by the host's, so each answer bounds by how much it is wrong, and the quicker it came, the better.
 *
 * A running guest's clock is corrected, too: see sandbox/guest-clocks.ts.
 */

/** What the guest's clock said at some moment between the two, all in ms since the Unix epoch. */
export interface ClockReading {
  readonly askedAt: number;
  readonly answeredAt: number;
  readonly guestMs: number;
}

/** Good enough for a guest that runs, in ms: what is asked of it then holds nobody up. */
const wantedErrorMs = 5;

/** Good enough for a start, which waits for each answer, in ms: a guest that runs is soon corrected. */
const startErrorMs = 20;

/** An answer that took longer, in ms, is of a busy host, on which much may have come between: it tells too little. */
const trustedAnswerMs = 250;

/** Whether a guest's clock is right, as far as an answer tells. One that is fast by more than the answer took is not. */
export function seemsRight(reading: ClockReading): boolean {
  const { least, most } = boundsOf(reading);
  return most - least <= trustedAnswerMs && least <= wantedErrorMs && most >= -wantedErrorMs;
}

/** On a busy host no answer may be quick. */
const maxQuestions = 4;

/**
 * A clock that is wrong by no more is brought right gradually, in ms: that takes 100 s, 0.5 ms a second (adjtime(3)), and no
 * program sees time jump. What is further away is set at once.
 */
const slewLimitMs = 50;

/** How a guest's clock is to be corrected. */
export interface Correction {
  /** 0 for not at all. */
  readonly byMs: number;
  /** At once, and not gradually. */
  readonly stepped: boolean;
}

/**
 * What a clock needs that was right once. One that may be right is left alone, however little the answers tell.
 *
 * @param ask reads the guest's clock
 */
export async function findCorrection(ask: () => Promise<ClockReading>): Promise<Correction> {
  let { least, most } = boundsOf(await ask());
  for (let questions = 1; questions < maxQuestions && most - least > 2 * wantedErrorMs; questions += 1) {
    const bounds = boundsOf(await ask());
    least = Math.max(least, bounds.least);
    most = Math.min(most, bounds.most);
    // The host's own clock was set meanwhile.
    if (least > most) ({ least, most } = bounds);
  }
  if (least <= wantedErrorMs && most >= -wantedErrorMs) return { byMs: 0, stepped: false };
  const byMs = (least + most) / 2;
  return { byMs, stepped: Math.abs(byMs) > slewLimitMs };
}

/**
 * Sets the clock of a guest right before its start.
 *
 * @param first reading, of the answer to something else
 * @param ask moves the guest's clock by so many ms, and reads it then
 */
export async function setClock(first: ClockReading, ask: (byMs: number) => Promise<ClockReading>): Promise<void> {
  let { least, most } = boundsOf(first);
  for (let questions = 0; questions < maxQuestions; questions += 1) {
    if (Math.max(Math.abs(least), Math.abs(most)) <= startErrorMs) return;
    const byMs = (least + most) / 2;
    const bounds = boundsOf(await ask(byMs));
    least = Math.max(least - byMs, bounds.least);
    most = Math.min(most - byMs, bounds.most);
    // The host's own clock was set meanwhile.
    if (least > most) ({ least, most } = bounds);
  }
}

/** By how much the guest's clock was slow, at least and at most. */
function boundsOf({ askedAt, answeredAt, guestMs }: ClockReading): { least: number; most: number } {
  return { least: askedAt - guestMs, most: answeredAt - guestMs };
}

/** The agent tells times in nanoseconds. */
export function toMs(ns: bigint): number {
  return Number(ns) / 1e6;
}

export function toNs(ms: number): bigint {
  return BigInt(Math.round(ms * 1e6));
}
