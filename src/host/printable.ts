/**
 * Without escape sequences, control characters, and those that turn the direction of writing: a guest's words end up on
 * the user's terminal.
 */
export function printable(text: string): string {
  return (
    text
      // biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is removed. ECMA-48: CSI … final byte.
      .replace(/\u001b\[[0-?]*[ -/]*[@-~]/g, '')
      .replace(/\r\n?/g, '\n')
      // biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is removed.
      .replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069]/g, '')
  );
}

/** What of a program's output goes into an error message. */
const lastLinesCount = 5;

/** The last lines of a text on one, fit to be shown. */
export function lastLines(text: string): string {
  return printable(text).trim().split('\n').slice(-lastLinesCount).join('; ');
}
