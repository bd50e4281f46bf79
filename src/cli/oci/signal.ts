import { constants } from 'node:os';
import { KilnError } from '../../errors.ts';

/** signal(7), x86 and ARM. */
const lastSignal = 64;
const firstRealtime = 34;

/** A signal by its number or its name, with or without "SIG". @throws KilnError invalid-argument */
export function parseSignal(text: string): number {
  const number = /^\d+$/.test(text) ? Number(text) : numberOf(text.toUpperCase().replace(/^SIG/, ''));
  if (number !== undefined && number >= 1 && number <= lastSignal) return number;
  throw new KilnError('invalid-argument', `unknown signal ${JSON.stringify(text)}`);
}

function numberOf(name: string): number | undefined {
  const realtime = /^RT(MIN|MAX)(?:([+-])(\d+))?$/.exec(name);
  if (realtime === null) return constants.signals[`SIG${name}` as NodeJS.Signals];
  const [, end, sign, offset] = realtime;
  const number = (end === 'MIN' ? firstRealtime : lastSignal) + Number(`${sign ?? '+'}${offset ?? '0'}`);
  return number >= firstRealtime ? number : undefined;
}
