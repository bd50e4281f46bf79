import { appendFileSync, closeSync, openSync } from 'node:fs';
import { KilnError } from '../../errors.ts';

/** Where and how a command tells of errors: runc's `--log` and `--log-format`. */
export interface ReportOptions {
  /** A file, beside stderr. */
  readonly log?: string;
  readonly logFormat?: string;
}

/** Makes sure that the log can be written before anything is done. @throws KilnError invalid-argument, in runc's words */
export function openLog({ log, logFormat = 'text' }: ReportOptions): void {
  if (logFormat !== 'text' && logFormat !== 'json') {
    throw new KilnError('invalid-argument', `invalid log-format: ${logFormat}`);
  }
  if (log === undefined) return;
  try {
    closeSync(openSync(log, 'a', 0o644));
  } catch (error) {
    throw new KilnError('invalid-argument', `cannot write the log ${log}: ${(error as NodeJS.ErrnoException).code}`, {
      cause: error,
    });
  }
}

/**
 * Tells of an error as runc does, so that callers find it where they look: a line of the log, which is stderr where no other
 * is named, and of whose last line containerd's runc shim, conmon and podman make their message. Beside a log, stderr gets
 * the bare message.
 */
export function report(error: unknown, { log, logFormat }: ReportOptions): void {
  const message = KilnError.from(error).userMessage;
  const time = new Date().toISOString().replace(/\.\d+Z$/, 'Z');
  const text = `time=${JSON.stringify(time)} level=error msg=${JSON.stringify(message)}\n`;
  const line = logFormat === 'json' ? `${JSON.stringify({ level: 'error', msg: message, time })}\n` : text;
  if (log === undefined) {
    process.stderr.write(line);
    return;
  }
  process.stderr.write(`${message}\n`);
  try {
    appendFileSync(log, line, { mode: 0o644 });
  } catch {
    // It is on stderr.
  }
}
