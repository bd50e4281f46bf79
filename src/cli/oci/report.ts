import { appendFileSync } from 'node:fs';
import { KilnError } from '../../errors.ts';

/** Where and how a command tells of errors: runc's `--log` and `--log-format`. */
export interface ReportOptions {
  /** A file, beside stderr. */
  readonly log: string | undefined;
  readonly format: 'text' | 'json';
}

/**
 * Tells of an error as runc does, so that callers find it where they look: one line on stderr, and the same in the log,
 * whose last line containerd's runc shim, conmon and podman read.
 */
export function report(error: unknown, { log, format }: ReportOptions): void {
  const message = KilnError.from(error).userMessage;
  const time = new Date().toISOString().replace(/\.\d+Z$/, 'Z');
  const text = `time=${JSON.stringify(time)} level=error msg=${JSON.stringify(message)}\n`;
  process.stderr.write(text);
  if (log === undefined) return;
  const line = format === 'json' ? `${JSON.stringify({ level: 'error', msg: message, time })}\n` : text;
  try {
    appendFileSync(log, line, { mode: 0o644 });
  } catch {
    // It is on stderr.
  }
}
