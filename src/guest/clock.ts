/**
 * A guest's wall clock. Hello tells the guest when its connection came, and so the clock is fast by what the host took to
 * notice it: nothing, or on a busy host too much. What the guest's clock says at its answer lies between question and answer
 * by the host's, so each answer bounds by how much it is wrong, and the quicker it came, the better.
 */

/** What the guest's clock said at some moment between the two, all in ms since the Unix epoch. */
export interface ClockReading {
  readonly askedAt: number;
  readonly answeredAt: number;
  readonly guestMs: number;
}

/** Good enough, in ms. */
const wantedErrorMs = 5;

/** Whether a guest's clock can be right, by an answer. One that is fast by more than the answer took is not. */
export function mayBeRight(reading: ClockReading): boolean {
  const { least, most } = boundsOf(reading);
  return least <= wantedErrorMs && most >= -wantedErrorMs;
}

/** On a busy host no answer may be quick. */
const maxQuestions = 4;

/**
 * Sets a guest's clock right.
 *
 * @param first reading, of the answer to something else
 * @param ask moves the guest's clock by so many ms, and reads it then
 */
export async function setClock(first: ClockReading, ask: (byMs: number) => Promise<ClockReading>): Promise<void> {
  let { least, most } = boundsOf(first);
  for (let questions = 0; questions < maxQuestions; questions += 1) {
    if (Math.max(Math.abs(least), Math.abs(most)) <= wantedErrorMs) return;
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
