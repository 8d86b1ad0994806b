-- Sends every CT Series to the C-Spine Node as soon as Orthanc calls it stable.
--
-- Only Instances of CT SOP Classes are sent, so neither the node's results (SEG, SR) nor a dose report among the
-- slices ever goes there, and nothing goes round in circles. Whether a Series can be analysed is the node's decision.

local NODE = 'cspine'  -- the node's name in "DicomModalities"

local CT_SOP_CLASSES = {
  ['1.2.840.10008.5.1.4.1.1.2'] = true,    -- CT Image Storage
  ['1.2.840.10008.5.1.4.1.1.2.1'] = true,  -- Enhanced CT Image Storage
  ['1.2.840.10008.5.1.4.1.1.2.2'] = true,  -- Legacy Converted Enhanced CT Image Storage
}

-- All scripts of an Orthanc share their functions: what another one does is kept, if it is listed before this one.
local earlierOnStableSeries, earlierOnJobFailure = OnStableSeries, OnJobFailure

local function ctInstances(seriesId)
  local found = {}
  for _, instance in ipairs(ParseJson(RestApiGet('/series/' .. seriesId, true)).Instances) do
    if CT_SOP_CLASSES[RestApiGet('/instances/' .. instance .. '/metadata/SopClassUid', true)] then
      table.insert(found, instance)
    end
  end
  return found
end

function OnStableSeries(seriesId, tags, metadata)
  if earlierOnStableSeries then
    earlierOnStableSeries(seriesId, tags, metadata)
  end
  local instances = ctInstances(seriesId)
  if #instances > 0 then
    print('cspine: sending ' .. #instances .. ' Instances of Series ' .. tags.SeriesInstanceUID)
    -- A job in the background: it must not hold up Orthanc. One job is one association, so the node need not wait
    -- for its quiet time to know that it has the whole Series.
    RestApiPost('/modalities/' .. NODE .. '/store', DumpJson({Resources = instances, Synchronous = false}), true)
  end
end

function OnJobFailure(jobId)
  if earlierOnJobFailure then
    earlierOnJobFailure(jobId)
  end
  local job = ParseJson(RestApiGet('/jobs/' .. jobId, true))
  local node = ParseJson(RestApiGet('/modalities/' .. NODE .. '/configuration', true))
  if job.Type == 'DicomModalityStore' and job.Content.RemoteAet == node.AET then
    print('cspine: NOT SENT: ' .. job.ErrorDescription .. '. When the node answers, resubmit job ' .. jobId)
  end
end
