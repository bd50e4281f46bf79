/** The control protocol between kilnd and those who talk to it: the launcher and the `kiln` command. */
export { controlCall } from './client.ts';
export { Readiness } from './readiness.ts';
export {
  type ControlReply,
  type ControlRequest,
  controlMessageLimit,
  type DeleteRequest,
  type LauncherContext,
  type StartRequest,
} from './request.ts';
export { type ControlHandler, ControlServer, type ControlServerOptions, controlSocketIsServed } from './server.ts';
export { controlSocketPath } from './socket-path.ts';
