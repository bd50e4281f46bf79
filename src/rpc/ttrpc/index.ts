/** ttrpc for Node: docs/ttrpc.md. */
export { type CallOptions, TtrpcClient } from './client.ts';
export {
  type DecodedRequest,
  decodeReply,
  decodeRequest,
  encodeFailure,
  encodeReply,
  encodeRequest,
  type RequestEnvelope,
} from './envelope.ts';
export {
  type DecodedFrame,
  encodeFrame,
  FrameDecoder,
  type FrameHeader,
  frameFlag,
  headerLength,
  maxDataLength,
  messageType,
} from './frame.ts';
export {
  type CallContext,
  type Handler,
  type MessageCodec,
  type ServiceTable,
  type TtrpcConnection,
  unary,
} from './handler.ts';
export { type ServeOptions, TtrpcServer, type TtrpcServerOptions } from './server.ts';
export { type CallStatus, type StatusName, statusCode, statusName, TtrpcError } from './status.ts';
